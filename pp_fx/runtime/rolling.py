"""`decode="rolling"` of an engine: all tokens that decode read the compact weights of one selection.

It lies with what outlives a step (transformers' pages, vLLM's plug-in), as a generation's lies on its KV cache, and in
the same memory from choice to choice. The first one is the history's of a calibrated model, else that of the first
step that prunes a prompt; until then tokens that decode run dense. From then on it follows the text: the inputs of the
last tokens that decoded are kept, and every so many steps they are probed. A history that alone selects has chosen once
and for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layouts import is_plain
from ..methods import Compensation
from .compensate import compensate
from .plan import LayerInfo, Plan, lasting_tokens, new_selection
from .probe import ProbeRows, keep_window, probe_state
from .select import choose_units, unit_scores
from .selections import Selection
from .state import GroupState


def roll(
    state: GroupState, plan: Plan, layer: LayerInfo, residual: Tensor, parameters: tuple[Any, ...], weight: Tensor
) -> Plan:
    """See to the selection before the tokens of an engine's step that decode read it.

    Args:
        residual: [1, T, H], what the probe reads.
        parameters: of the probe's copy of the branch.
        weight: of the output projection, [H, C].

    Returns:
        The plan, with the selection among its `stored`, where there is one.
    """
    step = plan.engine
    if step is None or step.decode != "rolling" or not state.prunes:
        return plan
    if state.kind not in plan.stored and state.calibrated:
        plan = _choose(state, plan, layer, None, None, weight, lasting_tokens(plan.settings))
    if plan.once:
        return plan
    rows = residual if step.others is None else residual.index_select(1, step.others)
    size = plan.settings.reprobe_every
    window = keep_window(state, rows[:, : step.decoding], layer, step.cache, size)
    if step.reprobes:
        every = ProbeRows(None, torch.arange(size, device=window.device), None)
        z = probe_state(state, (window,), parameters)
        plan = _choose(state, plan, layer, z, every, weight, size)
    return plan


def _choose(
    state: GroupState, plan: Plan, layer: LayerInfo, z: Tensor | None, rows: ProbeRows | None, weight: Tensor,
    tokens: int,
) -> Plan:  # fmt: skip
    """Choose from the probe's state [1, T', C], or from the history; what is there may stay (`drift_threshold`)."""
    own = _own(state, plan, tokens)
    selection = choose_units(state, unit_scores(state, z, rows, None, own), own, layer)
    compensate(state, selection, z, rows, weight, own)
    return _with(plan, state, selection)


def adopt(
    state: GroupState,
    plan: Plan,
    layer: LayerInfo,
    selection: Selection | None,
    compensation: Compensation | None,
    weight: Tensor,
) -> Plan:
    """Keep what a step has chosen for its prompts as the first selection of the tokens that decode, beside them on.

    Args:
        selection, compensation: of the prompts.
        weight: of the output projection, [H, C].

    Returns:
        The plan, with the selection among its `stored`.
    """
    step = plan.engine
    if step is None or step.cache is None or not step.prunes or selection is None or state.kind in plan.stored:
        return plan
    if state.calibrated:  # then the history is the first to choose
        return plan
    own = _own(state, plan, plan.shape[1])
    made = new_selection(layer, own, state.kind, selection.kept, selection.columns)
    made.read_weights(state.holds_compact, False)
    if compensation is not None:
        made.compensate(compensation, is_plain(weight))
    return _with(plan, state, made)


def _own(state: GroupState, plan: Plan, tokens: int) -> Plan:
    """The plan of a choice for the tokens that decode, made from so many."""
    first = state.kind not in plan.stored
    cache = plan.engine.cache  # type: ignore[union-attr]
    return Plan((1, tokens), plan.settings, first, not first, cache, plan.stored, keeps=True)


def _with(plan: Plan, state: GroupState, selection: Selection | None) -> Plan:
    assert selection is not None
    return plan._replace(stored={**plan.stored, state.kind: selection})
