"""Linear layers over the kept rows or columns of their weight. `selection` None runs the original call, bit for bit.

A call without a KV cache gathers the kept weights for itself. Decoding would gather them at every token, so a prompt on
the caller's cache keeps what it gathers with the selection (compact weights), with the input projections stacked: one
pass over memory per group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.packed_linear import packs
from ..layouts import is_plain, row_range, take_columns
from ..methods import Compensation
from .compact import CompactLinear, compact_linear
from .plan import Plan
from .select import reuse, selects
from .selections import Selection
from .state import GroupState
from .step import linear

Linear = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer."""
Rows = tuple[int, int, int] | Tensor | None
"""Which rows of a weight belong to a part of it: (start, stop, step), int64 [C], or None for all."""
Part = tuple[Tensor, Tensor | None, Rows]
"""Weight and bias of a linear layer, and the rows of a part of it."""


def gather_rows(
    selection: Selection | None,
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    layout: tuple[tuple[int, Rows], ...],
    pruned: int,
    ahead: tuple[Tensor | None, ...] | None = None,
    *,
    step: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor | None, ...]:
    """Input projections of the kept units.

    Args:
        x: [B, T, H].
        weights, biases: [out, H] and [out] or None of the linear layers.
        layout: for every projection its linear layer and its rows there (fused layers hold several projections).
        pruned: so many projections, the first ones, run the kept units' rows; the others, parts of the same fused
            layers, run all of theirs.
        ahead: what `rows_ahead` has computed of them.
        step: what `step.gated_step` has made of the MLP, if it did: then what follows runs on no channels.
        plan: of the call, where decode steps have kernels for what runs whole (`step.linear`).

    Returns:
        [B, T, kept columns] for every pruned projection, [B, T, C] for the others.
    """
    if step is not None:
        return tuple(x[..., :0] for _ in layout)
    if ahead is not None:
        if ahead[0] is not None:
            return ahead
        if selection is None:
            layout = layout[:pruned]
    if selection is None:
        outputs = [linear(plan, x, w, b) for w, b in zip(weights, biases, strict=True)]
        return tuple(_part(outputs[i], rows) for i, rows in layout)
    columns, exports = selection.columns, selection.exports
    picked = [_index(rows, columns) if i < pruned else rows for i, (_, rows) in enumerate(layout)]
    parts: list[Part] = [(weights[i], biases[i], rows) for (i, _), rows in zip(layout, picked, strict=True)]
    if selection.compacts and not exports and selection.inputs_due:
        return _hold(selection, x, parts, None if ahead is None else pruned)
    if selection.compacts and selection.inputs is not None:
        done = [
            part for linear, sizes in selection.inputs for part in torch.split(compact_linear(x, linear), sizes, -1)
        ]
        return (*done, *(F.linear(x, *_rows(*part, exports)) for part in parts[len(done) :]))
    if ahead is not None:
        parts = parts[:pruned]
    if _at_once(selection, weights[0]):
        return tuple(
            _product(x, *part) if i < pruned else F.linear(x, *_rows(*part, exports)) for i, part in enumerate(parts)
        )
    linears = [_rows(*part, exports) for part in parts]
    if exports:  # the compact weights leave the graph as they were gathered
        selection.pass_inputs([CompactLinear(*linear) for linear in linears[:pruned]])
    return tuple(F.linear(x, w, b) for w, b in linears)


def rows_ahead(state: GroupState, plan: Plan, *linears: Any) -> tuple[Tensor | None, ...]:
    """Of a group's fused input projections what can run before the selection is known.

    Args:
        linears: arguments of `gather_rows`.

    Returns:
        All of them where this call makes no selection; else the whole ones, and None for the pruned ones.
    """
    return whole_rows(*linears) if selects(state, plan) else gather_rows(reuse(state, plan), *linears)


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


def _hold(selection: Selection, x: Tensor, parts: list[Part], pruned: int | None) -> tuple[Tensor, ...]:
    """Gather the projections as decode steps read them, and run the first `pruned` of them (None: all)."""
    if not all(is_plain(weight) for weight, _, _ in parts):  # what is quantized is multiplied as it was, one by one
        linears = [selection.hold_input(*_rows(*part), position) for position, part in enumerate(parts)]
        return tuple(compact_linear(x, linear) for linear in linears[:pruned])
    old = selection.inputs[0][0] if selection.inputs else None
    weight, bias, sizes = _stack(parts, old)
    linear = selection.hold_inputs(weight, bias, sizes)
    if pruned is None:
        return torch.split(compact_linear(x, linear), sizes, -1)
    wanted = sum(sizes[:pruned])
    out = F.linear(x, weight[:wanted], None if bias is None else bias[:wanted])
    return torch.split(out, sizes[:pruned], -1)


def gather_heads(selection: Selection | None, heads: Tensor) -> Tensor:
    """The kept heads of a whole tensor: [B, heads, ..] -> [B, kept, ..]."""
    return heads if selection is None else heads.index_select(1, selection.kept)


def gather_vector(selection: Selection | None, vector: Tensor, *, step: Tensor | None = None) -> Tensor:
    """The kept channels of a parameter: [C] -> [kept]; none after a `step` (`gather_rows`)."""
    if step is not None:
        return vector[:0]
    return vector if selection is None else vector.index_select(0, selection.columns)


def gather_columns(
    selection: Selection | None,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    compensation: Compensation | None = None,
    step: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Output projection of the kept units: z [B, T, kept columns], weight [H, C] -> [B, T, H].

    A `step` [B, T, H] has made it already; `plan` as for `gather_rows`. The compensation's vector is added like a bias,
    its correction to the kept columns.
    """
    if step is not None:
        return step
    if selection is None:
        return linear(plan, z, weight, bias)
    if not is_plain(weight):
        return _quantized_columns(selection, z, weight, bias, compensation)
    if selection.compacts and not selection.output_due:
        return compact_linear(z, selection.output)  # type: ignore[arg-type]
    if compensation is not None:
        bias = compensation.vector if bias is None else bias + compensation.vector
    if selection.compacts:
        kept = corrected(_kept_columns(weight, selection), compensation)
        return compact_linear(z, selection.hold_output(kept, bias))
    selection.settle()
    return _compensated(selection, z, weight, bias, compensation)


def _quantized_columns(
    selection: Selection, z: Tensor, weight: Tensor, bias: Tensor | None, compensation: Compensation | None
) -> Tensor:
    """As `gather_columns`; the compensation stays beside the weight, since no correction goes into rounded numbers."""
    if not selection.compacts:
        selection.settle()
        out = F.linear(z, take_columns(weight, selection.columns), bias)
    elif selection.output_due:
        out = compact_linear(z, selection.hold_output(take_columns(weight, selection.columns), bias))
    else:
        out = compact_linear(z, selection.output)  # type: ignore[arg-type]
    return beside(out, z, compensation)


def beside(out: Tensor, z: Tensor, compensation: Compensation | None) -> Tensor:
    """An output [.., H] of the kept columns z [.., k] with a compensation that no weight has taken in."""
    if compensation is None:
        return out
    out = out + compensation.vector.to(out.dtype)  # a model that was cast keeps the dtype of its quantized weights
    if compensation.correction is None:
        return out
    for factor in compensation.correction:
        z = z @ factor.to(z.dtype)
    return out + z


def _compensated(
    selection: Selection, z: Tensor, weight: Tensor, bias: Tensor | None, compensation: Compensation | None
) -> Tensor:
    """A prompt's output projection; a correction of low rank goes to the rows of z where that is less work."""
    rows, hidden, kept = z.flatten(0, -2), weight.shape[0], selection.columns.shape[0]
    factors = None if compensation is None else compensation.correction
    low_rank = factors is not None and len(factors) == 2
    at_once = _at_once(selection, weight.t()) and (factors is None or low_rank)
    to_rows = low_rank and (at_once or rows.shape[0] * (kept + hidden) < kept * hidden)
    out: Tensor
    if at_once:
        out = kernels.gather_output(rows, weight.t(), selection.columns)
        out = out if bias is None else out + bias
    else:
        columns = _kept_columns(weight, selection)
        out = F.linear(rows, columns if to_rows else corrected(columns, compensation), bias)
    if to_rows:
        out = out + (rows @ factors[0]) @ factors[1]  # type: ignore[index]
    return out.view(*z.shape[:-1], hidden)


def corrected(kept: Tensor, compensation: Compensation | None) -> Tensor:
    """Kept columns [H, kept] with the compensation's correction, in the same memory layout."""
    if compensation is None or compensation.correction is None:
        return kept
    factors = compensation.correction
    if len(factors) == 1:
        return kept + factors[0].t()
    if kept.stride(0) == 1:
        return torch.addmm(kept.t(), *factors).t()
    return torch.addmm(kept, factors[1].t(), factors[0].t())


def _at_once(selection: Selection, weight: Tensor) -> bool:
    """Whether one operator gathers and multiplies: kept rows read in place, or copies too large to be kept waiting."""
    if selection.compacts or selection.exports or not is_plain(weight):
        return False
    return selection.in_place or kernels.large(weight, selection.columns)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """[..., H] -> [..., kept] in one operator."""
    out: Tensor = kernels.gather_linear(x.flatten(0, -2), weight, rows).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias.index_select(0, rows)  # type: ignore[arg-type]


def _kept_columns(weight: Tensor, selection: Selection) -> Tensor:
    """[H, C] -> [H, kept], in the memory layout of the weight."""
    width = selection.columns.shape[0] // selection.kept.shape[0]
    if width == 1 or selection.exports:
        return kernels.kept_rows(weight.t(), selection.columns, selection.exports).t()
    # all columns of a head at a time: compilers would compute the index of every element anew
    heads: Tensor = weight.unflatten(1, (-1, width)).index_select(1, selection.kept)
    return heads.flatten(1)


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


def _rows(weight: Tensor, bias: Tensor | None, rows: Rows, exports: bool = False) -> Linear:
    if rows is None:
        return weight, bias
    if isinstance(rows, tuple):
        return row_range(weight, rows), None if bias is None else bias[slice(*rows)]
    return kernels.kept_rows(weight, rows, exports), None if bias is None else bias.index_select(0, rows)


def _stack(parts: list[Part], old: CompactLinear | None) -> tuple[Tensor, Tensor | None, list[int]]:
    """Several linear layers of one input as one, and their sizes; rows go straight into the memory of the old one."""
    if old is not None and _overwrites(parts, old):
        sizes = [w.shape[0] if rows is None else len(range(*rows)) if isinstance(rows, tuple) else len(rows)
                 for w, _, rows in parts]  # fmt: skip
        for (weight, _, rows), memory in zip(parts, torch.split(old.weight, sizes), strict=True):
            if isinstance(rows, Tensor):
                kernels.kept_rows(weight, rows, out=memory)
            else:
                memory.copy_(_rows(weight, None, rows)[0])
        weight = old.weight
        biases = [None if b is None else _rows(b[:, None], None, rows)[0][:, 0] for _, b, rows in parts]
    else:
        linears = [_rows(*part) for part in parts]
        sizes, biases = [w.shape[0] for w, _ in linears], [b for _, b in linears]
        weight = torch.cat([w for w, _ in linears])
    if all(b is None for b in biases):
        return weight, None, sizes
    zeros = (weight.new_zeros(size) for size in sizes)
    return weight, torch.cat([zero if b is None else b for zero, b in zip(zeros, biases, strict=True)]), sizes


def _overwrites(parts: list[Part], old: CompactLinear) -> bool:
    """Whether rows may be gathered into memory that is there already: uncompiled, unpacked, without gradients."""
    weight = parts[0][0]
    if torch.compiler.is_compiling() or old.packed or packs(weight):
        return False
    if (old.weight.dtype, old.weight.device) != (weight.dtype, weight.device):
        return False  # the model was moved since
    learns = torch.is_grad_enabled() and any(w.requires_grad for w, _, _ in parts)
    return not learns and (torch.is_inference_mode_enabled() or not old.weight.is_inference())
