"""A decode step in which every token chooses the MLP's channels for itself (`decode="step"`).

What a token needs is told by its own gate: a channel's contribution to the output is factor(gate) * up * the channel's
column of the output projection, of which the gate's factor and the column's norm are known before the other two
projections run. Nothing is remembered from call to call, and no token's choice depends on another's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..kernels import strongest
from ..kernels.coded import coded_rows
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
        x: [B, T, H], input of the input projections.
        gate, up: the input projections.
        weight, bias: of the output projection, [H, C] and [H] or None.

    Returns:
        [B, T, H], or None where this call is no decode step.
    """
    if not steps(state, plan):
        return None
    rows = x.flatten(0, -2)
    native = not plan.exports and strongest.serves(weight, rows.shape[0])
    (gate_weight, gate_bias), (up_weight, up_bias) = _rows(gate), _rows(up)
    linear = strongest.linear_rows if native else F.linear
    if state.coded is None:
        factor = _factor(state, linear(rows, gate_weight, gate_bias))
        strength = _strength(state, factor)
    else:
        ranked = coded_rows(rows, state.coded)
        strength = _strength(state, _factor(state, ranked if gate_bias is None else ranked + gate_bias))
        if native:
            exact = strongest.chosen_rows(strength, rows, gate_weight, gate_bias, state.step_units)
        else:
            exact = F.linear(rows, gate_weight, gate_bias)
        factor = _factor(state, exact)
    product = strongest.strongest if native or plan.exports else strongest.plain_strongest
    out = product(strength, factor, rows, up_weight, up_bias, weight.t(), bias, state.step_units)
    return out.view(*x.shape[:-1], -1)


def output_step(state: GroupState, plan: Plan, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The output projection of an MLP without a gate: it reads the columns of each token's strongest channels.

    Args:
        z: [B, T, C], its whole input.
        weight, bias: [H, C] and [H] or None.

    Returns:
        [B, T, H], or None where this call is no decode step.
    """
    if not steps(state, plan):
        return None
    rows = z.flatten(0, -2)
    strength = _strength(state, rows)
    at_once = plan.exports or strongest.serves(weight, rows.shape[0])
    product = strongest.strongest if at_once else strongest.plain_strongest
    out = product(strength, rows, rows, None, None, weight.t(), bias, state.step_units)
    return out.view(*z.shape[:-1], -1)


def steps(state: GroupState, plan: Plan) -> bool:
    """Whether the tokens of this call choose for themselves."""
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


def _rows(part: Part) -> tuple[Tensor, Tensor | None]:
    weight, bias, rows = part
    if rows is None:
        return weight, bias
    return weight[slice(*rows)], None if bias is None else bias[slice(*rows)]
