"""Linear layers over the kept rows or columns of their weight. `selection` None runs the original call, bit for bit.

A prompt gathers the kept weights for its own call. Decoding would gather them at every token, so its first step keeps
them with the selection (compact weights), with the input projections stacked: one pass over memory per group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Linear, Selection


def gather_rows(
    selection: Selection | None, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """Input projections of the kept units.

    Args:
        x: [B, T, H].
        weights, biases: [C, H] and [C] or None of every input projection of the group.

    Returns:
        One [B, T, kept columns] for each.
    """
    if selection is None:
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    if not selection.compacts:
        return tuple(F.linear(x, *_rows(w, b, selection.columns)) for w, b in zip(weights, biases, strict=True))
    if selection.inputs is None:
        selection.inputs = _stack([_rows(w, b, selection.columns) for w, b in zip(weights, biases, strict=True)])
    return F.linear(x, *selection.inputs).chunk(len(weights), -1)


def gather_columns(
    selection: Selection | None, z: Tensor, weight: Tensor, bias: Tensor | None, compensation: Tensor | None
) -> Tensor:
    """Output projection of the kept units: z [B, T, kept columns], weight [H, C] -> [B, T, H].

    The weight of a pruned group is stored transposed in memory, so its columns are contiguous rows there.
    `compensation` [H] is added like a bias.
    """
    if selection is None:
        return F.linear(z, weight, bias)
    if selection.output is None:
        kept = weight.t().index_select(0, selection.columns).t()
        if compensation is not None:
            bias = compensation if bias is None else bias + compensation
        if not selection.compacts:
            return F.linear(z, kept, bias)
        selection.output = kept, bias
    kept, bias = selection.output
    out = F.linear(z, kept)
    return out if bias is None else out + bias  # for few rows cheaper than a bias inside the product


def _rows(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Linear:
    return weight.index_select(0, rows), None if bias is None else bias.index_select(0, rows)


def _stack(linears: list[Linear]) -> Linear:
    """Several linear layers of one input as one. Either all have a bias or none."""
    weights, biases = zip(*linears, strict=True)
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)
