"""A step of an engine with continuous batching, taken apart: tokens of prompts, and the others.

What lies between `prompt_rows` and `join_rows` runs on the prompts' tokens alone: probe, selection, projections,
history.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .gather import gather_columns
from .plan import Plan
from .state import GroupState
from .step import steps, strongest_columns


def _parts(state: GroupState, plan: Plan) -> tuple[Tensor, Tensor] | None:
    """Places of the prompts' tokens and of the others, int64 [P] and [D]; None where all tokens run in one way."""
    step = plan.engine
    if step is None or step.prompts is None or step.others is None or not (state.prunes or steps(state, plan)):
        return None
    return step.prompts, step.others


def prompt_rows(state: GroupState, tensor: Tensor, plan: Plan) -> Tensor:
    """The prompts' tokens of an engine's step: [1, T, ..] or [T, H] -> [1, P, ..] or [P, H]; of other calls all."""
    parts = _parts(state, plan)
    return tensor if parts is None else tensor.index_select(-2, parts[0])


def whole_step(state: GroupState, plan: Plan, step: Tensor | None) -> Tensor | None:
    """What `step.gated_step` has made, if that are all tokens of the call; else None."""
    return step if _parts(state, plan) is None else None


def join_rows(
    state: GroupState,
    plan: Plan,
    out: Tensor,
    residual: Tensor,
    parameters: tuple[Any, ...],
    weight: Tensor,
    bias: Tensor | None,
    step: Tensor | None = None,
) -> Tensor:
    """The output of all tokens of an engine's step; of other calls `out` itself.

    Args:
        out: [1, P, H] or [P, H], what the prompts' tokens have made.
        residual: [1, T, H], from which the others run the branch: the probe's own copy of it.
        parameters: of that copy.
        weight, bias: of the output projection, [H, C] and [H] or None.
        step: [1, D, H] or [D, H], what `step.gated_step` has made of the others, if it did.

    Returns:
        [1, T, H] or [T, H].
    """
    parts = _parts(state, plan)
    if parts is None:
        return out
    prompts, others = parts
    if step is None:
        step = _run(state, plan, residual.index_select(1, others), parameters, weight, bias)
    whole = out.new_empty(residual.shape[1], out.shape[-1])
    whole = whole.index_copy(0, prompts, out.flatten(0, -2)).index_copy(0, others, step.flatten(0, -2).to(out.dtype))
    return whole.view(*out.shape[:-2], *whole.shape)


def _run(
    state: GroupState, plan: Plan, residual: Tensor, parameters: tuple[Any, ...], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The branch over the others [1, D, H]. What they do not need is left out behind the input projections.

    These run whole: the probe's copy reads whole weights, and beside prompts a step is not short of bandwidth.
    """
    z = state.probe(state, residual, *parameters)
    if steps(state, plan):
        return strongest_columns(state, plan, z, weight, bias)
    selection = plan.stored.get(state.kind)
    if selection is None or plan.engine is None or plan.engine.decode == "dense":
        return F.linear(z, weight, bias)
    kept = z.index_select(-1, selection.columns)
    return gather_columns(selection, kept, weight, bias, compensation=selection.compensation)
