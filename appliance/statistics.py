"""What a difference between two arms on the same rows is worth, and what so many rows can show.

Exact: McNemar's test on discordant pairs, its power by summation, and the sign flip of groups where rows
come in groups. Intervals are Wilson's for one arm and Newcombe's for the paired difference, on as many
rows as the groups are worth. It stands below the rooms, because the check of a dataset
states what the verdict will judge by, and needs no library, because that check is part of the light core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from statistics import NormalDist


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` against `losses` discordant pairs; 1.0 without any.

    McNemar (1947): under no difference a discordant pair is a fair coin.
    """
    discordant, most = wins + losses, max(wins, losses)
    ways = next(ways for count, ways in _list_tails(discordant) if count == most)
    return min(1.0, 2 * ways / (1 << discordant))


def _list_tails(d: int) -> Iterator[tuple[int, int]]:
    """(wins, in how many of the 2^d ways there are at least so many), from d wins down; whole numbers."""
    ways = tail = 1
    for wins in range(d, -1, -1):
        yield wins, tail
        ways = ways * wins // (d - wins + 1)
        tail += ways


def sign_flip_exact(nets: Sequence[int]) -> float:
    """Two-sided exact p-value of groups of rows, each by its wins less its losses; McNemar's where none is beyond 1.

    Under no difference the two arms may be exchanged in any group, all its rows together (Fisher 1935). The ways
    to reach each sum are counted in the slots of one whole number, as many bits wide as there can be ways.
    """
    sizes = [abs(n) for n in nets if n]
    if max(sizes, default=1) == 1:
        return mcnemar_exact(wins=sum(n > 0 for n in nets), losses=sum(n < 0 for n in nets))
    slot, total = len(sizes) + 1, sum(sizes)
    ways = 1  # of choosing groups to win, by the rows that they have together
    for size in sizes:
        ways += ways << (slot * size)
    tail = ways >> (slot * ((total + abs(sum(nets))) // 2))
    mask, count = (1 << slot) - 1, 0
    while tail:
        count += tail & mask
        tail >>= slot
    return min(1.0, 2 * count / (1 << len(sizes)))


def design_effect(groups: Sequence[Sequence[float]]) -> float:
    """How many rows in these groups are worth one independent row, at least 1; for intervals (Rao and Scott 1992).

    The variance of the mean by groups over that by rows. Where rows do not vary it cannot be told, and a group
    counts as one row.
    """
    values = [v for g in groups for v in g]
    n, k = len(values), len(groups)
    mean = sum(values) / n
    by_rows = sum((v - mean) ** 2 for v in values) * n / max(1, n - 1)
    if k == 1 or not by_rows:
        return n / k
    by_groups = sum(sum(v - mean for v in g) ** 2 for g in groups) * k / (k - 1)
    return max(1.0, by_groups / by_rows)


def count_test_rows(rows: int, groups: int) -> str:
    """How many rows there are to judge by; those of one group are told apart from as many independent ones."""
    return f"{rows} test rows" if rows == groups else f"{rows} test rows in {groups} groups, each of which counts once"


def wilson_interval(successes: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion, within [0, 1] (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_gain_interval(
    *, both: float, wins: float, losses: float, neither: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the gain (wins - losses) / n over paired rows (Newcombe 1998, method 10).

    Counts need not be whole: rows in groups are divided by their `design_effect`.
    """
    n = both + wins + losses + neither
    ours, theirs = (both + wins) / n, (both + losses) / n
    low1, high1 = wilson_interval(both + wins, n, confidence=confidence)
    low2, high2 = wilson_interval(both + losses, n, confidence=confidence)
    spread = math.sqrt((both + wins) * (losses + neither) * (both + losses) * (wins + neither))
    phi = _correct(both * neither - wins * losses, n) / spread if spread else 0.0
    gain = ours - theirs
    below = (ours - low1) ** 2 - 2 * phi * (ours - low1) * (high2 - theirs) + (high2 - theirs) ** 2
    above = (high1 - ours) ** 2 - 2 * phi * (high1 - ours) * (theirs - low2) + (theirs - low2) ** 2
    return max(-1.0, gain - math.sqrt(max(0.0, below))), min(1.0, gain + math.sqrt(max(0.0, above)))


def _correct(product: float, n: float) -> float:
    """The numerator of phi, corrected for continuity where the arms agree more than by chance: no tighter by luck."""
    return max(product - n / 2, 0.0) if product > 0 else product


@lru_cache(maxsize=256)
def smallest_gain(n: int, *, alpha: float, power: float = 0.8, worse: float = 0.05) -> float | None:
    """Smallest gain that the exact McNemar test finds in `n` rows with this power, `None` if none.

    `worse` is the share of rows that the candidate loses; the gain is the share won minus it.
    Found to 0.01 by exact summation over the multinomial of (win, loss, tie).
    """
    worst = round(worse * 100)
    for percent in range(1, 101 - 2 * worst):
        if _power(n, win=(percent + worst) / 100, loss=worse, alpha=alpha) >= power:
            return percent / 100
    return None


def _power(n: int, *, win: float, loss: float, alpha: float) -> float:
    """P(reject and wins > losses): over discordant counts d ~ Bin(n, win + loss), wins ~ Bin(d, share)."""
    discordant = win + loss
    total = 0.0
    for d in range(1, n + 1):
        chance = _chance(d, n, discordant)
        if chance < 1e-12:
            continue
        needed = _critical(d, alpha)
        if needed is not None:
            total += chance * sum(_chance(wins, d, win / discordant) for wins in range(needed, d + 1))
    return total


def _chance(k: int, n: int, p: float) -> float:
    """P(k of n) of a binomial, by logarithms so that no factor is too large for a float."""
    if p >= 1.0:
        return float(k == n)
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))


@lru_cache(maxsize=4096)
def _critical(d: int, alpha: float) -> int | None:
    """The fewest wins of `d` discordant pairs with two-sided p < alpha."""
    fewest = None
    for wins, ways in _list_tails(d):
        if 2 * ways / (1 << d) >= alpha:
            return fewest
        fewest = wins
    return fewest
