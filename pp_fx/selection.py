"""Which units run: fusion of probe and history, score, top-k; and the selection that a KV cache carries along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .compensation import COMPENSATIONS
from .scores import SCORES

if TYPE_CHECKING:
    from .probe import ProbeRows
    from .runtime import LayerIndex
    from .state import GroupState

_ATTRIBUTE = "pp_fx_selection"


def stored(cache: Any, layer: LayerIndex, name: str) -> Any:
    """What `store` put on this KV cache for a layer's group, or None."""
    selections = getattr(cache, _ATTRIBUTE, None)
    return None if selections is None else selections.get((layer.index, name))


def store(cache: Any, layer: LayerIndex, name: str, value: Any) -> None:
    """Keep a selection with the generation it belongs to: on its KV cache, never on the module."""
    if cache is None:
        return
    if getattr(cache, _ATTRIBUTE, None) is None:
        setattr(cache, _ATTRIBUTE, {})
    getattr(cache, _ATTRIBUTE)[(layer.index, name)] = value


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


def choose_units(state: GroupState, scores: Tensor | None, cache: Any, layer: LayerIndex) -> Tensor | None:
    """The kept units, int64 [kept_units] ascending; the cache's selection without scores; None means all (dense)."""
    if scores is None:
        return None if not state.prunes or state.mode == "calibrate" else stored(cache, layer, state.name)
    kept = scores.topk(state.kept_units).indices.sort().values
    store(cache, layer, state.name, kept)
    return kept


def compensate(
    state: GroupState,
    kept: Tensor | None,
    z: Tensor | None,
    rows: ProbeRows | None,
    weight: Tensor,
    cache: Any,
    layer: LayerIndex,
) -> Tensor | None:
    """The vector [H] that stands in for the dropped units; computed with the selection and kept with it."""
    from .probe import probe_channel_moment

    if kept is None or state.compensation is None:
        return None
    key = f"{state.name}_compensation"
    if z is None or rows is None:
        return stored(cache, layer, key)
    call = COMPENSATIONS[state.compensation]
    vector = call(state, state.columns_of(kept), probe_channel_moment(z, rows, 1), weight)
    store(cache, layer, key, vector)
    return vector
