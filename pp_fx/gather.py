"""Linear layers over the kept rows or columns of their weight. `selection` None runs the original call, bit for bit.

A prompt gathers the kept weights for its own call. Decoding would gather them at every token, so its first step keeps
them with the selection (compact weights), with the input projections stacked: one pass over memory per group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .cache import Selection
from .compact import compact_linear, store
from .compensation import Compensation

Linear = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer."""
Rows = tuple[int, int, int] | Tensor | None
"""Which rows of a weight belong to a part of it: (start, stop, step), int64 [C], or None for all."""


def gather_rows(
    selection: Selection | None,
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    layout: tuple[tuple[int, Rows], ...],
    pruned: int,
    ahead: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor | None, ...]:
    """Input projections of the kept units.

    Args:
        x: [B, T, H].
        weights, biases: [out, H] and [out] or None of the linear layers.
        layout: for every projection its linear layer and its rows there (fused layers hold several projections).
        pruned: so many projections, the first ones, run the kept units' rows; the others, parts of the same fused
            layers, run all of theirs.
        ahead: what `selection.rows_ahead` has computed of them.

    Returns:
        [B, T, kept columns] for every pruned projection, [B, T, C] for the others.
    """
    if ahead is not None:
        if ahead[0] is not None:
            return ahead
        layout = layout[:pruned]
    if selection is None:
        outputs = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        return tuple(_part(outputs[i], rows) for i, rows in layout)
    if selection.compacts and selection.inputs is not None:
        done = [part for linear, sizes in selection.inputs for part in compact_linear(x, linear).split(sizes, -1)]
        rest = ((weights[i], biases[i], rows) for i, rows in layout[len(done) :])
        return (*done, *(F.linear(x, *_rows(*whole)) for whole in rest))
    columns = selection.columns
    if _at_once(selection, weights[0]):
        return tuple(
            _product(x, weights[i], biases[i], _index(rows, columns))
            if position < pruned
            else F.linear(x, *_rows(weights[i], biases[i], rows))
            for position, (i, rows) in enumerate(layout)
        )
    linears = [
        _rows(weights[i], biases[i], _index(rows, columns) if position < pruned else rows)
        for position, (i, rows) in enumerate(layout)
    ]
    if not selection.compacts:
        return tuple(F.linear(x, w, b) for w, b in linears)
    if torch.compiler.is_exporting():  # the compact weights leave the graph as they were gathered
        selection.inputs = [(store(*linear), [linear[0].shape[0]]) for linear in linears[:pruned]]
        return tuple(F.linear(x, w, b) for w, b in linears)
    sizes, inputs = [w.shape[0] for w, _ in linears], store(*_stack(linears))
    selection.inputs = [(inputs, sizes)]
    return compact_linear(x, inputs).split(sizes, -1)


def whole_rows(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    layout: tuple[tuple[int, Rows], ...],
    pruned: int,
) -> tuple[Tensor | None, ...]:
    """As `gather_rows`, but None for the pruned projections."""
    whole = (F.linear(x, *_rows(weights[i], biases[i], rows)) for i, rows in layout[pruned:])
    return (*[None] * pruned, *whole)


def gather_heads(selection: Selection | None, heads: Tensor) -> Tensor:
    """The kept heads of a whole tensor: [B, heads, ..] -> [B, kept, ..]."""
    return heads if selection is None else heads.index_select(1, selection.kept)


def gather_vector(selection: Selection | None, vector: Tensor) -> Tensor:
    """The kept channels of a parameter: [C] -> [kept]."""
    return vector if selection is None else vector.index_select(0, selection.columns)


def gather_columns(
    selection: Selection | None, z: Tensor, weight: Tensor, bias: Tensor | None, compensation: Compensation | None
) -> Tensor:
    """Output projection of the kept units: z [B, T, kept columns], weight [H, C] -> [B, T, H].

    The compensation's vector is added like a bias, its correction to the kept columns.
    """
    if selection is None:
        return F.linear(z, weight, bias)
    if selection.output is None:
        if compensation is not None:
            bias = compensation.vector if bias is None else bias + compensation.vector
        if not selection.compacts:
            return _compensated(selection, z, weight, bias, compensation)
        kept = _corrected(_kept_columns(weight, selection), compensation)
        selection.output = store(kept.t(), bias)
        if compensation is not None:  # the compact weights have the correction now
            selection.compensation = Compensation(compensation.vector, None)
    return compact_linear(z, selection.output)


def _compensated(
    selection: Selection, z: Tensor, weight: Tensor, bias: Tensor | None, compensation: Compensation | None
) -> Tensor:
    """A prompt's output projection; a correction of low rank goes to the rows of z where that is less work."""
    rows, (hidden, kept) = z.flatten(0, -2), (weight.shape[0], selection.columns.shape[0])
    factors = None if compensation is None else compensation.correction
    low_rank = factors is not None and len(factors) == 2
    at_once = _at_once(selection, weight.t()) and (factors is None or low_rank)
    to_rows = low_rank and (at_once or rows.shape[0] * (kept + hidden) < kept * hidden)
    if at_once:
        out = kernels.gather_output(rows, weight.t(), selection.columns)
        out = out if bias is None else out + bias
    else:
        adds = None if to_rows else compensation
        out = F.linear(rows, _corrected(_kept_columns(weight, selection), adds).t(), bias)
    if to_rows:
        out = out + (rows @ factors[0]) @ factors[1]  # type: ignore[index]
    return out.view(*z.shape[:-1], hidden)


def _corrected(kept: Tensor, compensation: Compensation | None) -> Tensor:
    """Kept columns [kept, H] with the compensation's correction, in the same memory layout."""
    if compensation is None or compensation.correction is None:
        return kept
    factors = compensation.correction
    if len(factors) == 1:
        return kept + factors[0]
    if kept.stride(-1) == 1:
        return torch.addmm(kept, *factors)
    return torch.addmm(kept.t(), factors[1].t(), factors[0].t()).t()


def _at_once(selection: Selection, weight: Tensor) -> bool:
    """Whether one operator gathers and multiplies: kept rows read in place, or copies too large to be kept waiting."""
    if selection.compacts or torch.compiler.is_exporting():
        return False
    return selection.in_place or kernels.large(weight, selection.columns)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """[..., H] -> [..., kept] in one operator."""
    out = kernels.gather_linear(x.flatten(0, -2), weight, rows).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias.index_select(0, rows)


def _kept_columns(weight: Tensor, selection: Selection) -> Tensor:
    """[H, C] -> [kept, H], in the memory layout of the weight."""
    width = selection.columns.shape[0] // selection.kept.shape[0]
    if width == 1 or torch.compiler.is_exporting():
        return kernels.kept_rows(weight.t(), selection.columns)
    # all columns of a head at a time: compilers would compute the index of every element anew
    return weight.unflatten(1, (-1, width)).index_select(1, selection.kept).flatten(1).t()


def _index(rows: Rows, columns: Tensor) -> Tensor:
    """The kept columns of a part as rows of the weight."""
    if rows is None:
        return columns
    return columns * rows[2] + rows[0] if isinstance(rows, tuple) else rows.index_select(0, columns)


def _part(output: Tensor, rows: Rows) -> Tensor:
    """A part of a linear layer's output [B, T, out]."""
    if rows is None:
        return output
    return output[..., slice(*rows)] if isinstance(rows, tuple) else output.index_select(-1, rows)


def _rows(weight: Tensor, bias: Tensor | None, rows: Rows) -> Linear:
    if rows is None:
        return weight, bias
    if isinstance(rows, tuple):
        return weight[slice(*rows)], None if bias is None else bias[slice(*rows)]
    return kernels.kept_rows(weight, rows), None if bias is None else bias.index_select(0, rows)


def _stack(linears: list[Linear]) -> Linear:
    """Several linear layers of one input as one."""
    weight = torch.cat([w for w, _ in linears])
    if all(b is None for _, b in linears):
        return weight, None
    return weight, torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in linears])
