"""The verdict: ship, hold, inconclusive or reject, with its reasons and the numbers behind each.

The candidate must beat the better of the prompted arms and must not lose to the champion. Too few
rows are inconclusive, whatever they show, and so is a test that could not tell: only where a gain worth
its maintenance is ruled out does a verdict say "do not fine-tune". Missing answers are an error, never a pass.
Rows that remembering answers prove nothing, and are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from appliance.errors import EvaluationError
from appliance.evaluation.outputs import Result
from appliance.manifest import Outcome
from appliance.recipe import GateSection
from appliance.statistics import (
    count_test_rows,
    design_effect,
    paired_gain_interval,
    sign_flip_exact,
    smallest_gain,
    wilson_interval,
)

_PROMPTED = ("zero_shot", "few_shot")
_CHAMPION_ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Comparison:
    """The candidate against one arm on the same rows; `gain` is a share of rows, `groups` how many are independent."""

    against: str
    gain: float
    interval: tuple[float, float]
    p_value: float
    wins: int
    losses: int
    ties: int
    groups: int

    @property
    def rows(self) -> int:
        """How many rows were compared."""
        return self.wins + self.losses + self.ties


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided and why."""

    outcome: Outcome
    reasons: tuple[str, ...]
    metric: str
    n: int
    arms: dict[str, dict[str, Any]]
    best_prompted: str
    comparison: Comparison
    champion: Comparison | None
    power: dict[str, Any]
    slices: dict[str, dict[str, dict[str, Any]]]
    copies: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def judge(results: Sequence[Result], *, metric: str, gates: GateSection, copies: Collection[str] = ()) -> Verdict:
    """Decide from scored results. Raises `EvaluationError` when an arm or a score is missing.

    Rows with an id in `copies` have a near copy among the rows that were trained on, and count nowhere.
    """
    answered = len({r.id for r in results})
    results = [r for r in results if r.id not in copies]
    if answered and not results:
        raise EvaluationError(
            f"each of {answered} test rows has a near copy among training rows, so none is left to judge by; "
            "give near copies one group, or add rows"
        )
    scores = _gather(results, metric)
    n = len(scores["candidate"])
    groups = {r.id: r.group for r in results}
    prompted = [a for a in _PROMPTED if a in scores]
    best = max(prompted, key=lambda a: (sum(scores[a].values()), a))
    comparison = _compare(scores, against=best, groups=groups)
    champion = _compare(scores, against="champion", groups=groups) if "champion" in scores else None
    detectable = smallest_gain(comparison.groups, alpha=gates.alpha)
    outcome, reasons = _decide(comparison, champion, gates=gates, detectable=detectable, metric=metric)
    if n < answered:
        reasons.append(f"{answered - n} of {answered} test rows are not counted: near copies of training rows")
    return Verdict(
        outcome=outcome,
        reasons=tuple(reasons),
        metric=metric,
        n=n,
        arms={arm: _summarise([r for r in results if r.arm == arm], metric) for arm in scores},
        best_prompted=best,
        comparison=comparison,
        champion=champion,
        power={"n": comparison.groups, "alpha": gates.alpha, "smallest_gain": detectable},
        slices=_slice(results, metric),
        copies=answered - n,
    )


def _gather(results: Sequence[Result], metric: str) -> dict[str, dict[str, float]]:
    """Scores by arm and row id; every arm must have the same rows."""
    scores: dict[str, dict[str, float]] = {}
    for result in results:
        value = result.scores.get(metric)
        if value not in (0.0, 1.0):
            raise EvaluationError(
                f"row {result.id}, arm {result.arm}: {metric} is {value}, expected 0 or 1; evaluate again"
            )
        scores.setdefault(result.arm, {})[result.id] = value
    if "candidate" not in scores or not any(a in scores for a in _PROMPTED):
        raise EvaluationError(f"arms {sorted(scores)}: the candidate and a prompted arm are needed; evaluate again")
    for arm, rows in scores.items():
        if rows.keys() != scores["candidate"].keys():
            raise EvaluationError(
                f"arm {arm} has {len(rows)} rows, the candidate {len(scores['candidate'])}; evaluate again"
            )
    return scores


def _compare(scores: Mapping[str, Mapping[str, float]], *, against: str, groups: Mapping[str, str]) -> Comparison:
    """Rows of one group stand or fall together: the test flips groups, the interval is that of so many fewer rows."""
    pairs = {i: (ours, scores[against][i]) for i, ours in scores["candidate"].items()}
    counts = Counter(pairs.values())
    wins, losses = counts[1.0, 0.0], counts[0.0, 1.0]
    differences = _gather_groups({i: ours - theirs for i, (ours, theirs) in pairs.items()}, groups)
    worth = design_effect(differences)
    return Comparison(
        against=against,
        gain=(wins - losses) / len(pairs),
        interval=paired_gain_interval(
            both=counts[1.0, 1.0] / worth,
            wins=wins / worth,
            losses=losses / worth,
            neither=counts[0.0, 0.0] / worth,
        ),
        p_value=sign_flip_exact([int(sum(d)) for d in differences]),
        wins=wins,
        losses=losses,
        ties=len(pairs) - wins - losses,
        groups=len(differences),
    )


def _gather_groups(values: Mapping[str, float], groups: Mapping[str, str]) -> list[list[float]]:
    """The values of the rows of each group."""
    gathered: dict[str, list[float]] = {}
    for row, value in values.items():
        gathered.setdefault(groups[row], []).append(value)
    return list(gathered.values())


def _decide(
    comparison: Comparison,
    champion: Comparison | None,
    *,
    gates: GateSection,
    detectable: float | None,
    metric: str,
) -> tuple[Outcome, list[str]]:
    """The first rule that applies decides; a loss is told before a lack of rows."""
    found = _describe(comparison, metric)
    is_significant = comparison.p_value < gates.alpha
    if is_significant and comparison.gain < 0:
        return "reject", [f"worse than prompting: {found}"]
    if comparison.groups < gates.min_test_rows:
        finds = f"finds gains of {detectable * 100:.0f} points or more" if detectable else "finds no gain at all"
        there = count_test_rows(comparison.rows, comparison.groups)
        reason = f"{there}; the gate wants {gates.min_test_rows}: the test {finds} with 80% power; add rows"
        return "inconclusive", [reason, found]
    if not is_significant:
        worthwhile = f"a gain of {gates.min_gain * 100:g} points"
        if comparison.interval[1] >= gates.min_gain:
            reason = f"not significant at {gates.alpha:g}, and {worthwhile} is not ruled out; add test rows: {found}"
            return "inconclusive", [reason]
        return "hold", [f"{worthwhile} over prompting is ruled out: {found}; do not fine-tune for this"]
    if comparison.gain < gates.min_gain:
        return "hold", [f"a gain below {gates.min_gain * 100:g} points is not worth its maintenance: {found}"]
    if champion is not None:
        return _decide_on_champion(champion, found, gates=gates, metric=metric)
    return "ship", [found]


def _decide_on_champion(
    champion: Comparison, found: str, *, gates: GateSection, metric: str
) -> tuple[Outcome, list[str]]:
    """Of a candidate that ships otherwise: no loss is seen, and with a margin none of that size is left possible."""
    margin, beside = gates.champion_margin, _describe(champion, metric)
    if (champion.gain < 0 and champion.p_value < _CHAMPION_ALPHA) or champion.gain < -gates.min_gain:
        return "hold", [found, f"loses to the version in use: {beside}"]
    if margin is None:
        return "ship", [found, f"is not seen to lose to the version in use: {beside}"]
    if champion.interval[0] <= -margin:
        weak = f"a loss of {margin * 100:g} points to the version in use is not ruled out; add test rows"
        return "inconclusive", [found, f"{weak}: {beside}"]
    return "ship", [found, f"loses less than {margin * 100:g} points to the version in use: {beside}"]


def _describe(c: Comparison, metric: str) -> str:
    low, high = c.interval
    test = "exact McNemar" if c.groups == c.rows else f"exact sign flip of {c.groups} groups"
    return (
        f"{metric} {c.gain * 100:+.1f} points against {c.against} (95% interval {low * 100:+.1f} to {high * 100:+.1f}, "
        f"{test} p = {c.p_value:.2g}; {c.wins} rows better, {c.losses} worse, {c.ties} equal)"
    )


def _summarise(results: Sequence[Result], metric: str) -> dict[str, Any]:
    n = len(results)
    worth = design_effect(_gather_groups({r.id: r.scores[metric] for r in results}, {r.id: r.group for r in results}))
    mean = {name: sum(r.scores[name] for r in results) / n for name in results[0].scores}
    return {
        "n": n,
        "score": mean[metric],
        "interval": wilson_interval(mean[metric] * n / worth, n / worth),
        **{k: v for k, v in mean.items() if k != metric},
        "length_stops": sum(r.stop == "length" for r in results) / n,
        "mean_tokens": sum(r.tokens for r in results) / n,
        "mean_prompt_tokens": sum(r.prompt_tokens for r in results) / n,
        "seconds": round(sum(r.seconds for r in results), 2),
    }


def _slice(results: Sequence[Result], metric: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Score by category and arm."""
    slices: dict[str, dict[str, dict[str, Any]]] = {}
    for category in sorted({r.category for r in results if r.category is not None}):
        rows = [r for r in results if r.category == category]
        arms = sorted({r.arm for r in rows})
        picked = {a: [r.scores[metric] for r in rows if r.arm == a] for a in arms}
        slices[category] = {a: {"n": len(v), "score": sum(v) / len(v)} for a, v in picked.items()}
    return slices
