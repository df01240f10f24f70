"""A decode step in which every token chooses the MLP's channels for itself (`decode="step"`).

What a token needs is told by its own gate: a channel's contribution to the output is factor(gate) * up * the channel's
column of the output projection, of which the gate's factor and the column's norm are known before the other two
projections run. Nothing is remembered from call to call, and no token's choice depends on another's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import strongest
from ..kernels.coded import coded_rows
from ..layouts import Codes, codes_of, is_plain, row_range
from ..process_settings import without_autocast
from .plan import Plan
from .state import GroupState

Part = tuple[Tensor, Tensor | None, tuple[int, int, int] | None]
"""Weight and bias of a linear layer, and the range (start, stop, step) of its rows that belong to a projection."""


def gated_step(
    state: GroupState, plan: Plan, x: Tensor, gate: Part, up: Part, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """The whole MLP: the gate projection runs whole, the other two read each token's chosen channels.

    Args:
        x: [B, T, H] (or [T, H]), input of the input projections.
        gate, up: the input projections.
        weight, bias: of the output projection, [H, C] and [H] or None.

    Returns:
        [B, T, H] (or [T, H]), of an engine's mixed step its decoding tokens alone; None where this call is no decode
        step.
    """
    if not steps(state, plan):
        return None
    if plan.engine is not None and plan.engine.others is not None:
        x = x.index_select(-2, plan.engine.others)
    rows, count = x.flatten(0, -2), state.step_units
    (gate_weight, gate_bias), (up_weight, up_bias) = _rows(gate), _rows(up)
    read = None if plan.exports else _read(state, rows.shape[0], weight, gate_weight, up_weight)
    if state.coded is None:
        gated = F.linear(rows, gate_weight, gate_bias) if read is None else _linear(rows, read[1], gate_bias)
        factor = _factor(state, gated)
        strength = _strength(state, factor)
    else:
        ranked = coded_rows(rows, state.coded)
        strength = _strength(state, _factor(state, ranked if gate_bias is None else ranked + gate_bias))
        if read is None:
            exact = F.linear(rows, gate_weight, gate_bias)
        else:
            numbers, *scaling = read[1]
            exact = strongest.chosen_rows(strength, rows, numbers, gate_bias, count, *scaling)
        factor = _factor(state, exact)
    if plan.exports:
        out = strongest.strongest(strength, factor, rows, up_weight, up_bias, weight.t(), bias, count)
    elif read is None:
        z = factor * F.linear(rows, up_weight, up_bias)
        out = F.linear(strongest.masked(strength, z, count), weight, bias)
    else:
        down, _, up_read = read
        given = up_read.numbers, up_bias, down.numbers, bias, count
        both = up_read.scales, down.scales, up_read.zeros, down.zeros
        out = strongest.strongest(strength, factor, rows, *given, *both)
    return out.view(*x.shape[:-1], -1)


def output_step(state: GroupState, plan: Plan, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The output projection of an MLP without a gate: it reads the columns of each token's strongest channels.

    Args:
        z: [B, T, C], its whole input.
        weight, bias: [H, C] and [H] or None.

    Returns:
        [B, T, H], or None where this call is no decode step, or an engine's, with prompts.
    """
    if not steps(state, plan) or (plan.engine is not None and plan.engine.others is not None):
        return None
    return strongest_columns(state, plan, z, weight, bias)


def strongest_columns(state: GroupState, plan: Plan, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`output_step` of tokens that are known to decode."""
    rows = z.flatten(0, -2)
    strength, count = _strength(state, rows), state.step_units
    read = None if plan.exports else _read(state, rows.shape[0], weight)
    if plan.exports:
        out = strongest.strongest(strength, rows, rows, None, None, weight.t(), bias, count)
    elif read is None:
        out = F.linear(strongest.masked(strength, rows, count), weight, bias)
    else:
        numbers, scales, zeros = read[0]
        scaling = None, scales, None, zeros
        out = strongest.strongest(strength, rows, rows, None, None, numbers, bias, count, *scaling)
    return out.view(*z.shape[:-1], -1)


def linear(plan: Plan | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer that runs whole: in a decode step on a CPU by the kernel for few tokens.

    torch's product of so few rows does not run at the memory's speed (docs/research/speed.md, section 11), but for one
    of fp32.

    Args:
        x: [.., in].
        weight, bias: [out, in], and [out] or None.

    Returns:
        [.., out]; of other calls than decode steps `torch.nn.functional.linear`, bit for bit.
    """
    if plan is None or not plan.steps or plan.exports or weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    if x.dtype != weight.dtype or not strongest.serves(weight, rows.shape[0]):
        return F.linear(x, weight, bias)
    codes = _Read(weight) if is_plain(weight) else codes_of(weight)
    if codes is None or codes.numbers.stride(1) != 1:
        return F.linear(x, weight, bias)
    return _linear(rows, codes, bias).view(*x.shape[:-1], -1)


def steps(state: GroupState, plan: Plan) -> bool:
    """Whether the tokens of this call, or of an engine's step those that decode, choose for themselves."""
    return plan.steps and state.steps and state.mode != "calibrate"


def _factor(state: GroupState, gate: Tensor) -> Tensor:
    """What the up projection is multiplied by."""
    factor: Tensor = state.factor(state, gate)  # type: ignore[misc]
    return factor


@without_autocast
def _strength(state: GroupState, factor: Tensor) -> Tensor:
    """|factor| times the norm of the channel's output column: fp32 [N, C]."""
    assert state.column_norm is not None
    return factor.float().abs() * state.column_norm


class _Read(NamedTuple):
    """A weight as the kernels read it: of the input's dtype, or what `Codes` holds."""

    numbers: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None


def _read(state: GroupState, tokens: int, output: Tensor, *inputs: Tensor) -> list[_Read] | None:
    """An MLP's weights as kernels read them, the output projection's transposed; None where torch's products run."""
    weights = output, *inputs
    if not all(strongest.serves(weight, tokens) for weight in weights):
        return None
    if all(map(is_plain, weights)):
        return [_Read(output.t()), *(_Read(weight) for weight in inputs)]
    if state.output_codes is None:
        return None
    read = [_Read(state.output_codes, state.output_scales, state.output_zeros)]
    for codes in map(codes_of, inputs):
        if codes is None or (codes.zeros is None) != (state.output_zeros is None):
            return None
        read.append(_Read(*codes))
    return read


def _linear(x: Tensor, weight: _Read | Codes, bias: Tensor | None) -> Tensor:
    numbers, scales, zeros = weight
    if numbers.dtype == torch.float32 and x.shape[0] == 1:
        return F.linear(x, numbers, bias)  # at the memory's speed already (docs/research/speed.md, section 13)
    return strongest.linear_rows(x, numbers, bias, scales, zeros)


def _rows(part: Part) -> tuple[Tensor, Tensor | None]:
    weight, bias, rows = part
    if rows is None:
        return weight, bias
    return row_range(weight, rows), None if bias is None else bias[slice(*rows)]
