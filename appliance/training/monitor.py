"""What the curves say: which step is best, when to stop, and what a person should know.

All of it is a fold over the journal's records and nothing else. The journal is cut back to the
checkpoint when a run resumes, so a resumed run decides exactly as the one that nothing interrupted.
The rules refuse (a loss that is not finite, or far above where it began), stop (no better evaluation
for `patience` of them) or only speak (overfitting, a climbing loss, a plateau, a collapse).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any, Literal

from appliance.recipe import TrainingSection

Keep = Literal["last", "best_loss", "best_exact_match"]
Kind = Literal["overfitting", "divergence", "plateau", "collapse", "stopped"]
Record = dict[str, Any]

_SMOOTHING = 0.2  # weight of a new loss: about the last ten steps
_SETTLED = 10  # steps until the smoothed loss means something
_EXPLODED = (3.0, 2.0, 5)  # raw loss above this many times, and this many nats over, its start, for so many steps
_LOST = (0.5, 1.0, 3.0)  # smoothed loss above its start by the largest of: this share, these nats, this much noise
_GAIN = 0.01  # a validation loss that moves by less has not moved
_PARTS = 8  # it must not have moved over this part of the run: as many evaluations are made by default
_SAME_ANSWER, _SAME_REFERENCE, _FEWEST_ROWS = 0.9, 0.5, 8
_USUAL_PATIENCE = 3


@dataclass(frozen=True, slots=True)
class Rules:
    """What is kept, how long a better evaluation is awaited, and when the run is over anyway."""

    keep: Keep
    patience: int | None
    max_steps: int


@dataclass(frozen=True, slots=True)
class Alert:
    """One thing a person should know, with the numbers it rests on."""

    step: int
    kind: Kind
    words: str
    numbers: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """A line of `events.jsonl`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One pass over the validation rows; `smoothed` is the training loss at that time."""

    step: int
    loss: float
    exact_match: float
    same_answer: float
    same_reference: float
    rows: int
    smoothed: float


@dataclass(frozen=True, slots=True)
class Watched:
    """All that the rules know after some records."""

    evaluations: tuple[Evaluation, ...] = ()
    best: Evaluation | None = None
    waited: int = 0
    is_stopped: bool = False
    refusal: str = ""
    alerts: tuple[Alert, ...] = ()
    active: frozenset[Kind] = frozenset()
    untrained: float = -math.inf
    has_moved: bool = False
    steps: int = 0
    smoothed: float = 0.0
    lowest: float = math.inf
    noise: float = 0.0
    last_loss: float = 0.0
    exploded: int = 0
    lost: int = 0
    climbed: int = 0
    rate: float = 0.0
    peak_rate: float = 0.0


def build_rules(section: TrainingSection, *, max_steps: int) -> Rules:
    """The rules of one run."""
    return Rules(keep=section.keep, patience=section.patience, max_steps=max_steps)


def watch_records(records: Iterable[Record], rules: Rules) -> Watched:
    """The state after a whole journal."""
    return reduce(lambda seen, record: watch_record(seen, record, rules), records, Watched())


def watch_record(seen: Watched, record: Record, rules: Rules) -> Watched:
    """The state after one more record: a step's (`loss`) or an evaluation's (`validation_loss`)."""
    if "validation_loss" in record:
        return _watch_evaluation(seen, record, rules)
    return _watch_step(seen, record) if "loss" in record else seen


def select_kept_step(seen: Watched, rules: Rules, *, last: int) -> int:
    """The step whose weights become the artifact: the best evaluated one, or the last."""
    return last if rules.keep == "last" or seen.best is None else seen.best.step


def measure_sameness(answers: Sequence[Sequence[int]]) -> float:
    """The largest share of rows that may have one and the same answer, by their known beginnings.

    An answer is known up to and with its first wrong token. Rows agree with the answer whose
    beginnings they are, so this is an upper bound: 1.0 for one answer whatever the input.
    """
    chain: list[tuple[tuple[int, ...], int]] = []  # beginnings of the answer at hand, each with its rows so far
    largest = 0
    for known, rows in sorted(Counter(map(tuple, answers)).items()):
        while chain and known[: len(chain[-1][0])] != chain[-1][0]:
            chain.pop()
        total = rows + (chain[-1][1] if chain else 0)
        chain.append((known, total))
        largest = max(largest, total)
    return largest / max(1, len(answers))


def _watch_step(seen: Watched, record: Record) -> Watched:
    step, loss, norm = record["step"], record["loss"], record.get("grad_norm", 0.0)
    if not math.isfinite(loss) or not math.isfinite(norm):
        return _refuse(seen, step, f"loss {loss}, gradient norm {norm}: not finite", {})
    count = seen.steps + 1
    weight = max(_SMOOTHING, 1 / count)
    smoothed = seen.smoothed + weight * (loss - seen.smoothed)
    jump = abs(loss - seen.last_loss) if seen.steps else 0.0
    start = seen.untrained if seen.has_moved else max(seen.untrained, loss, record.get("untrained_loss", loss))
    seen = replace(
        seen,
        steps=count,
        last_loss=loss,
        smoothed=smoothed,
        lowest=min(seen.lowest, smoothed) if count >= _SETTLED else seen.lowest,
        noise=seen.noise + weight * (jump - seen.noise),
        untrained=start,
        has_moved=seen.has_moved or record["learning_rate"] > 0,
        rate=record["learning_rate"],
        peak_rate=max(seen.peak_rate, record["learning_rate"]),
    )
    return _judge_climb(_judge_divergence(seen, step, start=start), step, start=start)


def _judge_divergence(seen: Watched, step: int, *, start: float) -> Watched:
    """Refuse a loss that has left the region where training can come back.

    `start` is the loss before the first update: the larger of the first step's and of the mean over some rows, as a
    first batch may be easy; while the rate is 0, as in the first step of a warm-up, the largest of several steps.
    """
    times, nats, patience = _EXPLODED
    high = seen.last_loss > max(times * start, start + nats)
    margin = max(_LOST[0] * start, _LOST[1], _LOST[2] * seen.noise)
    seen = replace(
        seen,
        exploded=seen.exploded + 1 if high else 0,
        lost=seen.lost + 1 if seen.smoothed > start + margin else 0,
    )
    numbers = {"loss": seen.last_loss, "smoothed": seen.smoothed, "start": start}
    if seen.exploded >= patience:
        what = f"loss {seen.last_loss:.2f} stays above {times:.0f} times {start:.2f}, where it began"
        return _refuse(seen, step, f"{what}: training diverged", numbers)
    if seen.lost >= _SETTLED:
        what = f"loss {seen.smoothed:.2f} (smoothed) stays above {start:.2f}, where it began"
        return _refuse(seen, step, f"{what}: training diverged", numbers)
    return seen


def _judge_climb(seen: Watched, step: int, *, start: float) -> Watched:
    """Say it when half of what was learned is lost again."""
    gained = start - seen.lowest
    is_high = gained > 0.3 and seen.smoothed - seen.lowest > 0.5 * gained + 2 * seen.noise
    seen = replace(seen, climbed=seen.climbed + 1 if is_high else 0)
    words = (
        f"divergence: training loss climbed from {seen.lowest:.3f} to {seen.smoothed:.3f}; "
        "a lower learning rate would hold it"
    )
    numbers = {"lowest": seen.lowest, "smoothed": seen.smoothed, "start": start}
    return _raise_alert(seen, step, "divergence", words, numbers, holds=seen.climbed >= _SETTLED)


def _watch_evaluation(seen: Watched, record: Record, rules: Rules) -> Watched:
    step = record["step"]
    found = Evaluation(
        step=step,
        loss=record["validation_loss"],
        exact_match=record.get("validation_exact_match", 0.0),
        same_answer=record.get("validation_same_answer", 0.0),
        same_reference=record.get("validation_same_reference", 1.0),
        rows=record.get("validation_rows", 0),
        smoothed=seen.smoothed,
    )
    if not math.isfinite(found.loss):
        return _refuse(seen, step, f"validation loss {found.loss}: not finite", {})
    is_best = seen.best is None or _rank(found, rules.keep) > _rank(seen.best, rules.keep)
    seen = replace(
        seen,
        evaluations=(*seen.evaluations, found),
        best=found if is_best else seen.best,
        waited=0 if is_best else seen.waited + 1,
    )
    usual = rules.patience or _USUAL_PATIENCE
    seen = _judge_plateau(_judge_overfitting(seen, found, usual), found, usual, span=rules.max_steps / _PARTS)
    return _judge_patience(_judge_collapse(seen, found), found, rules)


def _rank(found: Evaluation, keep: Keep) -> tuple[float, ...]:
    """Higher is better; equal exact matches are told apart by their loss."""
    return (found.exact_match, -found.loss) if keep == "best_exact_match" else (-found.loss,)


def _judge_overfitting(seen: Watched, found: Evaluation, patience: int) -> Watched:
    """Validation loss above its best for `patience` evaluations while training loss falls."""
    best = min(seen.evaluations, key=lambda e: e.loss)
    later = [e for e in seen.evaluations if e.step > best.step]
    holds = len(later) >= patience and found.loss > (1 + _GAIN) * best.loss and found.smoothed < best.smoothed
    words = (
        f"overfitting: validation loss rose from {best.loss:.3f} (step {best.step}) to {found.loss:.3f} while training "
        f"loss fell from {best.smoothed:.3f} to {found.smoothed:.3f}; fewer epochs, more diverse data, dropout or "
        "weight decay would help"
    )
    numbers = {"validation_loss": found.loss, "best_validation_loss": best.loss, "best_step": float(best.step)}
    return _raise_alert(seen, found.step, "overfitting", words, numbers, holds=holds)


def _judge_plateau(seen: Watched, found: Evaluation, patience: int, *, span: float) -> Watched:
    """Validation loss that does not move although the learning rate is still well above its end.

    Over more evaluations than `patience` and over `span` steps: between two close ones no loss moves.
    """
    before = [e.step for e in seen.evaluations[:-patience] if e.step <= found.step - span]
    losses = [e.loss for e in seen.evaluations if before and e.step >= before[-1]] or [found.loss]
    is_flat = len(losses) > patience and max(losses) - min(losses) <= _GAIN * min(losses)
    words = (
        f"plateau: validation loss has stayed near {found.loss:.3f} for {len(losses)} evaluations; nothing more is "
        "learned: fewer epochs would do, or a higher learning rate or rank if the score is too low"
    )
    numbers = {"validation_loss": found.loss, "lowest": min(losses), "highest": max(losses)}
    holds = is_flat and seen.rate >= 0.1 * seen.peak_rate
    return _raise_alert(seen, found.step, "plateau", words, numbers, holds=holds)


def _judge_collapse(seen: Watched, found: Evaluation) -> Watched:
    """One answer for nearly all rows, twice in a row, where the references differ."""
    holds = len(seen.evaluations) > 1 and all(
        e.rows >= _FEWEST_ROWS and e.same_answer >= _SAME_ANSWER and e.same_reference <= _SAME_REFERENCE
        for e in seen.evaluations[-2:]
    )
    words = (
        f"collapse: {found.same_answer:.0%} of the validation rows may get one and the same answer, and only "
        f"{found.same_reference:.0%} should; more diverse data, fewer epochs or a lower learning rate would help"
    )
    numbers = {"same_answer": found.same_answer, "same_reference": found.same_reference}
    return _raise_alert(seen, found.step, "collapse", words, numbers, holds=holds)


def _judge_patience(seen: Watched, found: Evaluation, rules: Rules) -> Watched:
    """Stop by rule: what comes after is not worth its time."""
    best = seen.best
    if best is None or rules.patience is None or seen.waited < rules.patience or found.step >= rules.max_steps:
        return seen
    words = (
        f"stopped early: {seen.waited} evaluations without a better one than step {best.step}'s "
        f"(validation loss {best.loss:.3f}, exact match {best.exact_match:.1%}); training.patience sets how many"
    )
    numbers = {"best_step": float(best.step), "best_validation_loss": best.loss, "waited": float(seen.waited)}
    return replace(_raise_alert(seen, found.step, "stopped", words, numbers, holds=True), is_stopped=True)


def _refuse(seen: Watched, step: int, what: str, numbers: dict[str, float]) -> Watched:
    words = f"{what}; lower training.learning_rate"
    alert = Alert(step, "divergence", words, numbers)
    return replace(seen, refusal=f"step {step}: {words}", alerts=(*seen.alerts, alert))


def _raise_alert(
    seen: Watched, step: int, kind: Kind, words: str, numbers: dict[str, float], *, holds: bool
) -> Watched:
    """Speak when a condition begins to hold, not again while it lasts."""
    if not holds:
        return replace(seen, active=seen.active - {kind})
    if kind in seen.active:
        return seen
    return replace(seen, active=seen.active | {kind}, alerts=(*seen.alerts, Alert(step, kind, words, numbers)))
