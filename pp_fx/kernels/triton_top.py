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

    By bisection, which ends as soon as a bound tells the `count` largest from the others: a third of the rounds before
    the bits are used up. (Counting three bounds a round in one 64-bit sum took twice as long on an H200.)
    """
    low = tl.min(tl.where(inside, keys, 2147483647), 0).to(tl.int64)
    high = tl.max(tl.where(inside, keys, -2147483648), 0).to(tl.int64)
    keys = tl.where(inside, keys, -2147483648)
    while low < high:
        middle = low + (high - low + 1) // 2
        reached = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(reached >= count, middle, low)
        high = tl.where(reached > count, high, tl.where(reached < count, middle - 1, middle))
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
