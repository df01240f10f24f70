"""The Triton kernel of `top`: one program finds the bound by a search in the scores' bits, then counts places."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 65536
"""Scores that one program holds in registers; more go through torch."""


@triton.jit
def bound(keys, inside, count):
    """A number that `count` of the int32 keys reach; more do only where several are equal to it.

    Every round counts those that reach three bounds in one sum, 20 bits each. The search ends as soon as a bound tells
    the `count` largest from the others, half of the rounds before the bits are used up.
    """
    low = tl.min(tl.where(inside, keys, 2147483647), 0).to(tl.int64)
    high = tl.max(tl.where(inside, keys, -2147483648), 0).to(tl.int64)
    keys = tl.where(inside, keys, -2147483648)
    while low < high:
        step = (high - low) // 4 + 1
        first, second, third = low + step, low + 2 * step, low + 3 * step  # those beyond `high` are not reached
        one, two, three = keys >= first.to(tl.int32), keys >= second.to(tl.int32), keys >= third.to(tl.int32)
        sums = tl.sum(one.to(tl.int64) + (two.to(tl.int64) << 20) + (three.to(tl.int64) << 40), 0)
        reach1, reach2, reach3 = sums & 0xFFFFF, (sums >> 20) & 0xFFFFF, sums >> 40
        low = tl.where(reach3 >= count, third, tl.where(reach2 >= count, second, tl.where(reach1 >= count, first, low)))
        high = tl.where(reach3 < count, third - 1, high)
        high = tl.where(reach2 < count, second - 1, high)
        high = tl.where(reach1 < count, first - 1, high)
        high = tl.where((reach1 == count) | (reach2 == count) | (reach3 == count), low, high)
    return low.to(tl.int32)


@triton.jit
def _kernel(scores, places, n, count, N: tl.constexpr):
    """The `count` largest of n scores: those above the bound, and of those equal to it the first ones."""
    i = tl.arange(0, N)
    inside = i < n
    bits = tl.load(scores + i, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    # as integers that lie in the order of the scores: the negative ones turned round
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    least = bound(keys, inside, count)
    above = inside & (keys > least)
    equal = inside & (keys == least)
    wanted = count - tl.sum(above.to(tl.int32), 0)
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= wanted))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(places + place, i.to(tl.int64), mask=taken)


def top(scores: Tensor, count: int) -> Tensor:
    """As `pp_fx.kernels.top`."""
    size = scores.shape[0]
    if size > LARGEST:
        return scores.topk(count).indices.sort().values
    places = torch.empty(count, dtype=torch.int64, device=scores.device)
    padded = max(16, triton.next_power_of_2(size))
    _kernel[(1,)](scores.contiguous(), places, size, count, N=padded, num_warps=min(32, max(1, padded // 512)))
    return places
