"""Which units run: fusion of probe and history, score, top-k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import StateError
from ..kernels import top
from ..methods import SCORES, Statistics
from ..process_settings import without_autocast
from .plan import LayerInfo, Plan, new_selection
from .probe import ProbeRows, probe_channel_moment, probe_moment, too_short
from .selections import Selection
from .state import GroupState


def fuse(probe: Tensor, history: Tensor, epsilon: float) -> Tensor:
    """Importance-scaled fusion, elementwise (paper, section 3.2): p * p/(p+g) + g * g/(p+g), 0 where p + g = 0."""
    total = probe + history + epsilon
    share = torch.where(total > 0, 1 / total, 0.0)
    return probe * (probe * share) + history * (history * share)


@without_autocast
def unit_scores(
    state: GroupState, z: Tensor | None, rows: ProbeRows | None, gram: Tensor | None, plan: Plan
) -> Tensor | None:
    """Score of every unit from the probe state z [B', T', C] and its Gram matrix: fp32 [units], or None."""
    if z is None or rows is None:
        return None
    score = SCORES[state.score]
    if score.relative:
        z = torch.nn.functional.normalize(z.float(), dim=-1)
    p = probe_moment(z, rows, 2)
    if state.energy is not None:
        if state.energy.ndim == 2:
            last = state.energy.shape[0] - 1
            history = state.energy.index_select(0, rows.positions.clamp(max=last))
        else:
            history = state.energy
        fused = fuse(p, history, plan.settings.fusion_epsilon)
        if rows.real is not None:  # a position without a real probe row says nothing
            fused = torch.where(rows.real.any(0)[:, None], fused, 0.0)
        p = torch.where(state.seen > 0, fused, p)
    seen = p.shape[0] if rows.real is None else rows.real.any(0).sum().clamp(min=1)
    mean = probe_channel_moment(z, rows, 1)
    if state.mean is not None:
        share = plan.settings.compensation_mix * state.seen
        mean = share * state.mean + (1 - share) * mean
        if gram is not None and state.gram is not None:
            gram = share * state.gram + (1 - share) * gram
    return score.units(_statistics(state, p.sum(0) / seen, mean, gram, plan.exports))


def history_scores(state: GroupState, exports: bool = False) -> Tensor:
    """Score of every unit from the history alone: fp32 [units]. For prompts too short to probe."""
    energy: Any = state.energy
    if energy.ndim == 2:
        energy = energy.mean(0)
    return SCORES[state.score].units(_statistics(state, energy, state.mean, state.gram, exports))


def _statistics(
    state: GroupState, energy: Tensor, mean: Tensor | None, gram: Tensor | None, exports: bool
) -> Statistics:
    shape, dropped = (state.units, state.width), state.units - state.kept_units
    return Statistics(energy.view(shape), mean.view(shape), state.column, dropped, gram, exports)  # type: ignore[union-attr]


def selects(state: GroupState, plan: Plan) -> bool:
    """Whether this call makes a new selection of the group."""
    return plan.selects and state.prunes and state.mode != "calibrate"


def reuse(state: GroupState, plan: Plan) -> Selection | None:
    """The generation's selection, for a call that makes none; None means dense. Decode steps want it compact."""
    if plan.selects or (plan.engine is not None and plan.engine.others is not None):
        return None  # an engine's tokens of prompts have nothing stored
    selection = plan.stored.get(state.kind)
    if selection is not None and not selection.compacts and state.holds_compact:
        selection.want_compact()
    return selection


@without_autocast
def choose_units(state: GroupState, scores: Tensor | None, plan: Plan, layer: LayerInfo) -> Selection | None:
    """The selection of this call: made anew, or the generation's; None means that all units run (dense)."""
    if not selects(state, plan):
        selection = reuse(state, plan)
        if selection is not None and scores is not None:
            return _reselect(state, scores, selection, plan)
        return selection
    if plan.once and state.held is not None and state.held.version == layer.version:
        return state.held
    if scores is None:
        if not state.calibrated:
            raise StateError(
                "probe=None chooses by the history, but the model is not calibrated; call pp_fx.calibrate first"
                if plan.settings.probe is None
                else "freeze_history=True chooses by the history alone in continuous batching, but the model is not "
                "calibrated; call pp_fx.calibrate first"
            )
        scores = history_scores(state, plan.exports)
    elif plan.exports and state.calibrated:
        scores = torch.where(too_short(state, plan), history_scores(state, True), scores)
    kept = top(scores, state.kept_units, plan.exports)
    selection = new_selection(layer, plan, state.kind, kept, state.columns_of(kept))
    compact = plan.exports or (plan.keeps and state.holds_compact)
    limit = 0 if compact else plan.settings.kernel_rows
    selection.read_weights(compact, limit > 0 and plan.shape[0] * plan.shape[1] <= limit)
    if plan.once:
        state.held = selection
    return selection


def _reselect(state: GroupState, scores: Tensor, selection: Selection, plan: Plan) -> Selection:
    """Take the selection of a re-probe; with a drift threshold only if it shares too few units with the old one."""
    kept, threshold, drifted = top(scores, state.kept_units, plan.exports), plan.settings.drift_threshold, None
    if threshold is not None:
        drifted = torch.isin(kept, selection.kept).float().mean() < threshold
        if not torch.compiler.is_compiling() and not bool(drifted):
            return selection
    selection.choose(kept, state.columns_of(kept), selection.version, drifted)
    return selection
