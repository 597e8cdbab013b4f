"""What a difference between two arms on the same rows is worth.

Exact where exact is cheap: McNemar's test on discordant pairs, its power by summation. Intervals
are Wilson's for one arm and Newcombe's for the paired difference.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` against `losses` discordant pairs; 1.0 without any.

    McNemar (1947): under no difference a discordant pair is a fair coin.
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def wilson_interval(successes: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion, within [0, 1] (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_gain_interval(
    *, both: int, wins: int, losses: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the gain (wins - losses) / n over paired rows (Newcombe 1998, method 10)."""
    n = both + wins + losses + neither
    ours, theirs = (both + wins) / n, (both + losses) / n
    low1, high1 = wilson_interval(both + wins, n, confidence=confidence)
    low2, high2 = wilson_interval(both + losses, n, confidence=confidence)
    spread = math.sqrt((both + wins) * (losses + neither) * (both + losses) * (wins + neither))
    phi = (both * neither - wins * losses) / spread if spread else 0.0
    gain = ours - theirs
    below = (ours - low1) ** 2 - 2 * phi * (ours - low1) * (high2 - theirs) + (high2 - theirs) ** 2
    above = (high1 - ours) ** 2 - 2 * phi * (high1 - ours) * (theirs - low2) + (theirs - low2) ** 2
    return max(-1.0, gain - math.sqrt(max(0.0, below))), min(1.0, gain + math.sqrt(max(0.0, above)))


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
    from scipy.stats import binom

    discordant = win + loss
    total = 0.0
    for d in range(1, n + 1):
        chance = float(binom.pmf(d, n, discordant))
        if chance < 1e-12:
            continue
        needed = _critical(d, alpha)
        if needed is not None:
            total += chance * float(binom.sf(needed - 1, d, win / discordant))
    return total


@lru_cache(maxsize=4096)
def _critical(d: int, alpha: float) -> int | None:
    """The fewest wins of `d` discordant pairs with two-sided p < alpha."""
    from scipy.stats import binom

    for wins in range(d // 2 + 1, d + 1):
        if 2 * float(binom.sf(wins - 1, d, 0.5)) < alpha:
            return wins
    return None
