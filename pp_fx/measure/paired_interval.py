"""By how many of the same problems one side may solve more or fewer than the other: an interval for paired answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from ..errors import InputError

_ADDED = 0.5
"""To each of the four cells: both solved, one alone, the other alone, neither."""


def paired_interval(before: Sequence[bool], after: Sequence[bool], level: float = 0.95) -> tuple[float, float]:
    """Interval of (solved after - solved before), in problems, of problems like these.

    The adjusted Wald interval for matched pairs (Agresti and Min, Simple improved confidence intervals for comparing
    matched proportions, Statistics in Medicine 24, 2005): it keeps near its level with few problems, and has a width
    where both sides solve the same ones.

    Args:
        before: whether each problem was solved, [N].
        after: the same problems, in the same order.
        level: share of such intervals that hold the true difference, in (0, 1).

    Returns:
        Low and high, within [-N, N].

    Raises:
        InputError: no problem, or not as many on both sides.
    """
    count = len(before)
    if not count or len(after) != count:
        raise InputError(f"before has {count} answers and after {len(after)}; give one for each problem on both sides")
    gained = sum(a and not b for b, a in zip(before, after, strict=True)) + _ADDED
    lost = sum(b and not a for b, a in zip(before, after, strict=True)) + _ADDED
    total = count + 4 * _ADDED
    middle = (gained - lost) / total
    error = math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    return count * max(middle - reach, -1.0), count * min(middle + reach, 1.0)
