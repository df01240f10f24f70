"""The order in which heads are dropped as a set: `pp_fx::drop_jointly`.

Every step waits for the one before, and on CUDA each of torch's steps is several launches: there one Triton program
takes them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 128
"""Heads whose Gram matrix one program holds in registers."""


def drop_jointly(gram: Tensor, dropped: int, exports: bool = False) -> Tensor:
    """Greedily drop the head that adds the least to the sum of the Gram matrix over the dropped set.

    Args:
        gram: fp32 [n, n], symmetric.
        dropped: how many heads, in [0, n).
        exports: an exported graph is being traced.

    Returns:
        fp32 [n]: 0, 1, .. in the order in which heads are dropped, infinity for the others.
    """
    if gram.is_cuda and not exports and gram.shape[0] <= LARGEST:
        return _drop_jointly(gram, dropped)
    return _steps(gram, dropped)


def _steps(gram: Tensor, dropped: int) -> Tensor:
    cost, added = gram.diagonal(), torch.zeros_like(gram[0])
    order = torch.full_like(cost, torch.inf)
    for step in range(dropped):
        head = torch.where(order.isinf(), cost + 2 * added, torch.inf).argmin()
        order = order.index_fill(0, head, step)
        added = added + gram.index_select(0, head[None])[0]
    return order


_drop_jointly = torch.library.custom_op("pp_fx::drop_jointly", _steps, mutates_args=())
_drop_jointly.register_fake(lambda gram, dropped: torch.empty_like(gram[0]))


@_drop_jointly.register_kernel("cuda")
def _(gram: Tensor, dropped: int) -> Tensor:
    from .triton_drop import drop_jointly as kernel

    return kernel(gram, dropped)
