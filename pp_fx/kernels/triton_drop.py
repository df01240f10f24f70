"""The Triton kernel of `drop_jointly`: the Gram matrix in one program's registers, a loop over the dropped heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(gram, order, n, dropped: tl.constexpr, N: tl.constexpr):
    """order[h] = the step in which head h is dropped, infinity where it stays."""
    i = tl.arange(0, N)
    inside = i < n
    matrix = tl.load(gram + i[:, None] * n + i[None, :], mask=inside[:, None] & inside[None, :], other=0.0)
    cost = tl.load(gram + i * n + i, mask=inside, other=0.0)
    added = tl.zeros((N,), tl.float32)
    found = tl.full((N,), float("inf"), tl.float32)
    for step in range(dropped):
        open_cost = tl.where(inside & (found == float("inf")), cost + 2 * added, float("inf"))
        head = tl.argmin(open_cost, 0)
        found = tl.where(i == head, step * 1.0, found)
        added += tl.sum(tl.where(i[:, None] == head, matrix, 0.0), 0)
    tl.store(order + i, found, mask=inside)


def drop_jointly(gram: Tensor, dropped: int) -> Tensor:
    """As `pp_fx.kernels.drop_jointly`."""
    size = gram.shape[0]
    order = torch.empty(size, dtype=torch.float32, device=gram.device)
    _kernel[(1,)](gram.contiguous(), order, size, dropped, N=max(16, triton.next_power_of_2(size)), num_warps=4)
    return order
