"""Linear layers over the kept rows or columns of their weight. `kept` None runs the original call, bit for bit."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .state import GroupState


def gather_rows(state: GroupState, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None) -> Tensor:
    """Input projection of the kept units: x [B, T, H], weight [C, H] -> [B, T, kept columns]."""
    if kept is None:
        return F.linear(x, weight, bias)
    rows = state.columns_of(kept)
    return F.linear(x, weight.index_select(0, rows), None if bias is None else bias.index_select(0, rows))


def gather_columns(
    state: GroupState, z: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None, compensation: Tensor | None
) -> Tensor:
    """Output projection of the kept units: z [B, T, kept columns], weight [H, C] -> [B, T, H].

    The weight of a pruned group is stored transposed in memory, so its columns are contiguous rows there.
    `compensation` [H] is added like a bias.
    """
    if kept is None:
        return F.linear(z, weight, bias)
    if compensation is not None:
        bias = compensation if bias is None else bias + compensation
    return F.linear(z, weight.t().index_select(0, state.columns_of(kept)).t(), bias)
