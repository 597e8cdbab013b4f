"""Laws of statistics and verdict: no claim without evidence, no pass by missing data."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import EvaluationError
from appliance.evaluation import Result, judge
from appliance.recipe import GateSection
from appliance.statistics import (
    design_effect,
    mcnemar_exact,
    paired_gain_interval,
    sign_flip_exact,
    smallest_gain,
    wilson_interval,
)

GATES = GateSection(min_test_rows=100)


def make_results(arms: dict[str, Sequence[float]], *, group: int = 1) -> list[Result]:
    """Results of each arm with these scores, row by row; `group` rows on end are one group."""
    return [
        Result(
            id=f"t{i}",
            arm=arm,
            output="",
            stop="eos",
            tokens=3,
            prompt_tokens=5,
            seconds=0.1,
            category="ab"[i % 2],
            group=f"g{i // group}",
            scores={"exact_match": float(score), "contract_valid": 1.0},
        )
        for arm, scores in arms.items()
        for i, score in enumerate(scores)
    ]


def pairs(*, both: int = 0, wins: int = 0, losses: int = 0, neither: int = 0) -> tuple[list[float], list[float]]:
    """(candidate, other) scores with this many rows of each kind."""
    kinds = [(1.0, 1.0)] * both + [(1.0, 0.0)] * wins + [(0.0, 1.0)] * losses + [(0.0, 0.0)] * neither
    return [a for a, _ in kinds], [b for _, b in kinds]


def decide(*, champion: tuple[int, int] | None = None, gates: GateSection = GATES, **counts: int) -> str:
    """The outcome for these paired rows; `champion` is (wins, losses) against it."""
    ours, theirs = pairs(**counts)
    arms = {"zero_shot": theirs, "candidate": ours}
    if champion is not None:
        wins, losses = champion
        won = [i for i, s in enumerate(ours) if s][:wins]
        lost = [i for i, s in enumerate(ours) if not s][:losses]
        arms["champion"] = [1.0 if i in lost else 0.0 if i in won else s for i, s in enumerate(ours)]
    return judge(make_results(arms), metric="exact_match", gates=gates).outcome


@pytest.mark.parametrize(
    ("counts", "outcome"),
    [
        ({"wins": 60, "neither": 60}, "ship"),
        ({"wins": 3, "neither": 17}, "inconclusive"),  # 3 points on 20 rows are no success
        ({"wins": 20}, "inconclusive"),  # nor is a clean sweep of too few rows
        ({"losses": 30, "neither": 100}, "reject"),
        ({"losses": 15}, "reject"),  # a loss is told before a lack of rows
        ({"both": 100, "wins": 12, "losses": 10, "neither": 100}, "inconclusive"),
        ({"both": 1000, "wins": 12, "losses": 10, "neither": 1000}, "hold"),  # more than a point is ruled out
        ({"both": 100, "wins": 8, "losses": 20, "neither": 100}, "hold"),
        ({"both": 25, "wins": 12, "losses": 3, "neither": 60}, "inconclusive"),  # 9 points, p = 0.035: a weak test
        ({"both": 1980, "wins": 20, "neither": 0}, "hold"),  # significant, and not worth its maintenance
        ({"both": 200}, "hold"),
    ],
)
def test_the_verdict_follows_its_rules(counts: dict[str, int], outcome: str) -> None:
    """Each rule on an example of its own."""
    assert decide(**counts) == outcome


def test_the_candidate_must_not_lose_to_the_version_in_use() -> None:
    """It may be equal; clearly worse holds it even where it beats prompting."""
    assert decide(both=20, wins=80, neither=20, champion=(2, 2)) == "ship"
    assert decide(both=20, wins=80, neither=20, champion=(0, 15)) == "hold"


def test_a_margin_wants_the_loss_to_the_version_in_use_ruled_out() -> None:
    """Few rows that see no loss are no proof of none; enough of them are, and a loss that is seen holds it still."""
    strict = GATES.model_copy(update={"champion_margin": 0.05})
    assert decide(both=20, wins=80, neither=20, champion=(4, 4), gates=strict) == "inconclusive"
    assert decide(both=200, wins=300, neither=200, champion=(8, 8), gates=strict) == "ship"
    assert decide(both=20, wins=80, neither=20, champion=(0, 15), gates=strict) == "hold"


def test_what_loses_by_the_margin_seldom_ships() -> None:
    """5 points worse in truth, a tenth of 400 rows answered differently: at most a trial in forty, else more."""
    rng, shipped = random.Random(3), Counter[str]()
    for _ in range(200):
        draws = [rng.random() for _ in range(400)]
        ours = [float((rng.random() < 0.8 and not 0.025 <= d < 0.1) or d < 0.025) for d in draws]
        theirs = [0.0 if d < 0.025 else 1.0 if d < 0.1 else right for d, right in zip(draws, ours, strict=True)]
        results = make_results({"zero_shot": [0.0] * 400, "champion": theirs, "candidate": ours})
        for margin in (None, 0.05):
            gates = GATES.model_copy(update={"champion_margin": margin, "min_gain": 0.5})
            shipped[f"{margin}"] += judge(results, metric="exact_match", gates=gates).outcome == "ship"
    assert shipped["0.05"] <= 0.025 * 200 < shipped["None"]


def test_the_best_prompted_arm_is_the_bar() -> None:
    """Few-shot beats zero-shot here, so it is few-shot that counts."""
    ours, weak = pairs(wins=60, neither=60)
    strong = [1.0] * 55 + [0.0] * 65
    verdict = judge(
        make_results({"zero_shot": weak, "few_shot": strong, "candidate": ours}), metric="exact_match", gates=GATES
    )
    assert verdict.best_prompted == "few_shot"
    assert verdict.comparison.wins == 5
    assert verdict.outcome != "ship"


def test_reasons_carry_the_numbers() -> None:
    """A reader can check the decision: gain, interval, p-value and rows."""
    ours, theirs = pairs(both=10, wins=60, losses=2, neither=48)
    verdict = judge(make_results({"zero_shot": theirs, "candidate": ours}), metric="exact_match", gates=GATES)
    assert "+48.3 points against zero_shot" in verdict.reasons[0]
    assert "60 rows better, 2 worse, 58 equal" in verdict.reasons[0]
    assert verdict.slices["a"]["candidate"]["n"] == 60
    assert verdict.power["smallest_gain"] == smallest_gain(120, alpha=0.01)


@pytest.mark.parametrize(
    "arms",
    [
        {"zero_shot": [1.0] * 3},
        {"candidate": [1.0] * 3},
        {"zero_shot": [1.0] * 3, "candidate": [1.0] * 4},
        {"zero_shot": [1.0] * 3, "candidate": [1.0, 0.5, 0.0]},
        {"zero_shot": [1.0] * 3, "candidate": [1.0, math.nan, 0.0]},
        {},
    ],
)
def test_missing_or_graded_data_is_an_error_never_a_pass(arms: dict[str, list[float]]) -> None:
    """An arm, a row or a score that is not there stops the run."""
    with pytest.raises(EvaluationError):
        judge(make_results(arms), metric="exact_match", gates=GATES)


def test_equal_models_are_shipped_in_at_most_one_of_twenty_trials() -> None:
    """A/A trials over base rates and agreement: the gate at 0.01 ships by chance in far less than 5%."""
    rng = random.Random(11)
    shipped = trials = 0
    for rate, agreement in product((0.1, 0.5, 0.9), (0.0, 0.5, 0.9)):
        for _ in range(60):
            ours, theirs = [], []
            for _ in range(150):
                first = float(rng.random() < rate)
                ours.append(first)
                theirs.append(first if rng.random() < agreement else float(rng.random() < rate))
            outcome = judge(
                make_results({"zero_shot": theirs, "candidate": ours}), metric="exact_match", gates=GATES
            ).outcome
            shipped += outcome == "ship"
            trials += 1
    assert shipped / trials <= 0.05


@pytest.mark.parametrize(("groups", "size"), [(100, 1), (100, 5), (120, 10)])
def test_equal_models_are_not_shipped_because_rows_come_in_groups(groups: int, size: int) -> None:
    """Rows of a group that are all right or all wrong together are one observation, to the test and to the interval."""
    rng = random.Random(3)
    judged = []
    for _ in range(200):
        ours, theirs = ([float(rng.random() < 0.5) for _ in range(groups)] for _ in range(2))
        spread = ([s for s in side for _ in range(size)] for side in (theirs, ours))
        arms = dict(zip(("zero_shot", "candidate"), spread, strict=True))
        judged.append(judge(make_results(arms, group=size), metric="exact_match", gates=GATES))
    shipped = sum(v.outcome == "ship" for v in judged)
    covered = sum(v.comparison.interval[0] <= 0 <= v.comparison.interval[1] for v in judged)
    assert shipped <= 0.025 * len(judged)
    assert covered >= 0.92 * len(judged)


def test_rows_of_one_group_count_once() -> None:
    """120 rows in 12 groups are 12: too few for the gate, told in words."""
    ours, theirs = pairs(wins=110, neither=10)
    results = make_results({"zero_shot": theirs, "candidate": ours}, group=10)
    verdict = judge(results, metric="exact_match", gates=GATES)
    assert verdict.outcome == "inconclusive"
    assert "120 test rows in 12 groups, each of which counts once; the gate wants 100" in verdict.reasons[0]
    assert "exact sign flip of 12 groups" in verdict.reasons[1]
    assert (verdict.comparison.rows, verdict.comparison.groups, verdict.power["n"]) == (120, 12, 12)


@given(st.lists(st.lists(st.integers(-1, 1), min_size=1, max_size=4), min_size=1, max_size=9))
@settings(max_examples=150, deadline=None)
def test_the_sign_flip_is_the_enumeration_of_all_flips(rows: list[list[int]]) -> None:
    """Every group is flipped in every way: the share of ways that are as far from nothing as what was seen."""
    nets = [sum(g) for g in rows]
    ways = [
        abs(sum(sign * net for sign, net in zip(signs, nets, strict=True)))
        for signs in product((1, -1), repeat=len(nets))
    ]
    assert sign_flip_exact(nets) == pytest.approx(sum(w >= abs(sum(nets)) for w in ways) / len(ways))


def test_single_rows_are_worth_a_row_and_copies_are_worth_one() -> None:
    """The design effect of independent rows is 1, of copies the size of their groups, of rows in between in between."""
    rng = random.Random(2)
    values = [float(rng.random() < 0.5) for _ in range(400)]
    assert design_effect([[v] for v in values]) == 1.0
    assert design_effect([[v] * 5 for v in values]) == pytest.approx(5.0, rel=0.01)
    assert design_effect([values[i : i + 4] for i in range(0, 400, 4)]) == pytest.approx(1.0, abs=0.3)
    assert design_effect([[0.0, 0.0], [0.0, 0.0]]) == 2.0, "rows that do not vary tell nothing of it"


def test_a_known_gain_is_shipped_at_the_stated_power() -> None:
    """Where the power table says 80%, about 80% of simulated trials are significant."""
    n, gain = 150, smallest_gain(150, alpha=0.01)
    assert gain is not None
    rng = random.Random(5)
    found = 0
    for _ in range(400):
        draws = [rng.random() for _ in range(n)]
        wins = sum(d < gain + 0.05 for d in draws)
        losses = sum(gain + 0.05 <= d < gain + 0.10 for d in draws)
        found += mcnemar_exact(wins, losses) < 0.01 and wins > losses
    assert 0.75 <= found / 400 <= 0.90


@pytest.mark.parametrize(("n", "points"), [(10, 78), (40, 28), (100, 15), (200, 9), (500, 5)])
def test_the_power_table(n: int, points: int) -> None:
    """The smallest detectable gains at 0.05 with 5% of rows worse."""
    gain = smallest_gain(n, alpha=0.05)
    assert gain is not None
    assert abs(gain * 100 - points) <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_that_of_scipy(wins: int, losses: int) -> None:
    """An independent implementation gives the same p-value, to the last digits."""
    from scipy.stats import binomtest

    expected = binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert mcnemar_exact(wins, losses) == pytest.approx(expected, rel=1e-12)


def test_thousands_of_rows_are_not_too_many() -> None:
    """No factor of the power leaves the range of a float, and more rows find a smaller gain."""
    gains = [smallest_gain(n, alpha=0.01) for n in (0, 5, 100, 1000, 10_000)]
    assert gains == [None, None, 0.19, 0.05, 0.02]


def test_mcnemar_by_hand() -> None:
    """2 * (0.5 ** 6) for six wins to nil; 1 for a draw and for nothing."""
    assert mcnemar_exact(6, 0) == pytest.approx(2 * 0.5**6)
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 0) == 1.0


@settings(max_examples=80, deadline=None)
@given(st.tuples(*[st.integers(0, 60)] * 4).filter(lambda c: sum(c) > 0))
def test_intervals_hold_the_estimate_and_stay_in_range(counts: tuple[int, int, int, int]) -> None:
    """Lower <= estimate <= upper, within what is possible; swapping the arms mirrors the interval."""
    both, wins, losses, neither = counts
    n = sum(counts)
    low, high = paired_gain_interval(both=both, wins=wins, losses=losses, neither=neither)
    assert -1 <= low <= (wins - losses) / n + 1e-9
    assert (wins - losses) / n - 1e-9 <= high <= 1
    mirrored = paired_gain_interval(both=both, wins=losses, losses=wins, neither=neither)
    assert mirrored == pytest.approx((-high, -low))
    low, high = wilson_interval(wins, n)
    assert 0 <= low <= wins / n + 1e-9
    assert wins / n - 1e-9 <= high <= 1


@pytest.mark.parametrize(
    ("counts", "printed"),
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),  # Newcombe (1998), table II, method 10
        ((20, 12, 2, 16), (0.0562, 0.3292)),  # the same, where the arms agree more than by chance
        ((1, 1, 7, 12), (-0.507, -0.026)),  # Fagerland, Lydersen, Laake (2014), airways of children
    ],
)
def test_newcombe_by_the_book(counts: tuple[int, int, int, int], printed: tuple[float, float]) -> None:
    """Method 10 has the correlation corrected for continuity; without that (method 8) it is narrower."""
    both, wins, losses, neither = counts
    interval = paired_gain_interval(both=both, wins=wins, losses=losses, neither=neither)
    assert interval == pytest.approx(printed, abs=0.0005)


@pytest.mark.parametrize("chances", [(0.3, 0.3, 0.1, 0.3), (0.3, 0.2, 0.2, 0.3), (0.4, 0.3, 0.1, 0.2)])
def test_an_interval_of_95_percent_holds_the_gain_so_often(chances: tuple[float, float, float, float]) -> None:
    """Over every outcome of 16 rows, each with its chance, where the arms agree more than by chance."""
    n, (_, win, loss, _) = 16, chances
    held = 0.0
    for counts in product(range(n + 1), repeat=4):
        if sum(counts) != n:
            continue
        both, wins, losses, neither = counts
        low, high = paired_gain_interval(both=both, wins=wins, losses=losses, neither=neither)
        ways = math.factorial(n) / math.prod(math.factorial(c) for c in counts)
        held += ways * math.prod(p**c for p, c in zip(chances, counts, strict=True)) * (low <= win - loss <= high)
    assert held >= 0.94
