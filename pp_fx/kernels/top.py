"""The largest of a row of scores, in ascending order of place: `pp_fx::top`.

On CUDA torch's top-k and the sort of its indices are twenty launches, longer than the products of a small prompt: there
one Triton program does both. Elsewhere, and in an exported graph, they are torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top(scores: Tensor, count: int, exports: bool = False) -> Tensor:
    """Places of the largest scores.

    Args:
        scores: fp32 [n], no NaN.
        count: how many, in [1, n]; a symbol in an exported graph.
        exports: an exported graph is being traced.

    Returns:
        int64 [count], ascending; of equal scores any.
    """
    if scores.is_cuda and not exports:
        return _top(scores, count)
    return scores.topk(count).indices.sort().values


@torch.library.custom_op("pp_fx::top", mutates_args=())
def _top(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count).indices.sort().values


@_top.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty(count, dtype=torch.int64)


@_top.register_kernel("cuda")
def _(scores: Tensor, count: int) -> Tensor:
    from .triton_top import top as kernel

    return kernel(scores, count)
