"""Which units run: fusion of probe and history, score, top-k, and what stands in for the dropped units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache import Selection
from .compensation import COMPENSATIONS
from .plan import store
from .scores import SCORES

if TYPE_CHECKING:
    from .plan import LayerInfo, Plan
    from .probe import ProbeRows
    from .state import GroupState


def fuse(probe: Tensor, history: Tensor, epsilon: float) -> Tensor:
    """Importance-scaled fusion, elementwise (paper, section 3.2): p * p/(p+g) + g * g/(p+g), 0 where p + g = 0."""
    total = probe + history + epsilon
    share = torch.where(total > 0, 1 / total, 0.0)
    return probe * (probe * share) + history * (history * share)


def unit_scores(state: GroupState, z: Tensor | None, rows: ProbeRows | None) -> Tensor | None:
    """Score of every unit from the probe state z [B', T', C]: fp32 [units]; None without a probe."""
    from .probe import probe_moment

    if z is None or rows is None:
        return None
    p = probe_moment(z, rows, 2)
    if state.energy is not None:
        if state.energy.ndim == 2:
            last = state.energy.shape[0] - 1
            history = state.energy.index_select(0, rows.positions.clamp(max=last))
        else:
            history = state.energy
        fused = fuse(p, history, state.config.fusion_epsilon)
        if rows.real is not None:  # a position without a real probe row says nothing
            fused = torch.where(rows.real.any(0)[:, None], fused, 0.0)
        p = torch.where(state.seen > 0, fused, p)
    importance = p.sum(0).view(state.units, state.width)
    return SCORES[state.config.score](importance, state.column_norm)


def history_scores(state: GroupState) -> Tensor:
    """Score of every unit from the history alone: fp32 [units]. For prompts too short to probe."""
    energy: Any = state.energy
    if energy.ndim == 2:
        energy = energy.mean(0)
    return SCORES[state.config.score](energy.view(state.units, state.width), state.column_norm)


def choose_units(state: GroupState, scores: Tensor | None, plan: Plan, layer: LayerInfo) -> Selection | None:
    """The selection of this call: made anew, or the generation's; None means that all units run (dense)."""
    if not plan.selects:
        selection = plan.stored.get(state.name)
        if selection is None:
            return None
        if scores is not None:
            return _reselect(state, scores, selection, plan, layer)
        if not selection.compacts and state.holds_compact:
            selection.compacts = True
        return selection
    if not state.prunes or state.mode == "calibrate":
        return None
    if scores is None:
        scores = history_scores(state)
    old = None if plan.empty is None else plan.stored[state.name]
    selection = _selection(state, _best(state, scores), layer, plan.empty, old)
    store(layer, plan, state.name, selection)
    return selection


def _best(state: GroupState, scores: Tensor) -> Tensor:
    return scores.topk(state.kept_units).indices.sort().values


def _selection(
    state: GroupState, kept: Tensor, layer: LayerInfo, changed: Tensor | None = None, old: Selection | None = None
) -> Selection:
    """A selection of the kept units; where the bool scalar `changed` is given and false, of the old ones."""
    if changed is None or old is None:
        return Selection(kept, state.columns_of(kept), layer.version)
    kept = torch.where(changed, kept, old.kept)
    selection = Selection(kept, state.columns_of(kept), layer.version)
    selection.former = changed, old.compensation
    return selection


def _reselect(state: GroupState, scores: Tensor, old: Selection, plan: Plan, layer: LayerInfo) -> Selection:
    """Take the selection of a re-probe; with a drift threshold only if it shares too few units with the old one."""
    kept, threshold, drifted = _best(state, scores), state.config.drift_threshold, None
    if threshold is not None:
        drifted = torch.isin(kept, old.kept).float().mean() < threshold
        if not torch.compiler.is_compiling() and not bool(drifted):
            return old
    selection = _selection(state, kept, layer, drifted, old)
    selection.compacts, selection.window = state.holds_compact, old.window
    store(layer, plan, state.name, selection)
    return selection


def compensate(
    state: GroupState,
    selection: Selection | None,
    z: Tensor | None,
    rows: ProbeRows | None,
    weight: Tensor,
) -> Tensor | None:
    """The vector [H] that stands in for the dropped units; computed with the selection and kept with it."""
    from .probe import probe_channel_moment

    if selection is None or selection.output is not None or state.compensation is None:
        return None  # compact weights have it in their bias
    if selection.compensation is None:
        probe_mean = None if z is None or rows is None else probe_channel_moment(z, rows, 1)
        dropped = torch.ones(weight.shape[1], device=weight.device).index_fill(0, selection.columns, 0)
        share = state.config.compensation_mix * state.seen
        vector = COMPENSATIONS[state.compensation](weight, dropped, state.mean, probe_mean, share)
        if selection.former is not None:
            changed, former = selection.former
            vector, selection.former = torch.where(changed, vector, former), None  # type: ignore[arg-type]
        selection.compensation = vector
    return selection.compensation
