"""A step of an engine with continuous batching, taken apart: prompt tokens run pruned, the others dense.

What lies between the two functions runs on the prompt tokens alone: probe, selection, projections, history.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .plan import Plan
from .state import GroupState


def _parts(state: GroupState, plan: Plan) -> tuple[Tensor, Tensor] | None:
    """Places of the pruned tokens and of the others, int64 [P] and [D]; None where all tokens run in one way."""
    step = plan.engine
    if step is None or step.pruned is None or step.dense is None or not state.prunes:
        return None
    return step.pruned, step.dense


def prompt_rows(state: GroupState, tensor: Tensor, plan: Plan) -> Tensor:
    """The pruned tokens of an engine's step: [1, T, ..] or [T, H] -> [1, P, ..] or [P, H]; of other calls all."""
    parts = _parts(state, plan)
    return tensor if parts is None else tensor.index_select(-2, parts[0])


def join_rows(
    state: GroupState,
    plan: Plan,
    out: Tensor,
    residual: Tensor,
    parameters: tuple[Any, ...],
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The output of all tokens of an engine's step; of other calls `out` itself.

    Args:
        out: [1, P, H] or [P, H], what the pruned tokens have made.
        residual: [1, T, H], from which the others run the whole branch: the probe's own copy of it.
        parameters: of that copy.
        weight, bias: of the output projection, [H, C] and [H] or None.

    Returns:
        [1, T, H] or [T, H].
    """
    parts = _parts(state, plan)
    if parts is None:
        return out
    pruned, others = parts
    z = state.probe(state, residual.index_select(1, others), *parameters)
    dense = F.linear(z, weight, bias).flatten(0, -2)
    whole = out.new_empty(residual.shape[1], out.shape[-1])
    whole = whole.index_copy(0, pruned, out.flatten(0, -2)).index_copy(0, others, dense.to(out.dtype))
    return whole.view(*out.shape[:-2], *whole.shape)
