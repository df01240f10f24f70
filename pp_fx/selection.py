"""Which units run: fusion of probe and history, score, top-k, and what stands in for the dropped units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache import Selection
from .compensation import COMPENSATIONS, Compensation, Known, least_squares_or_mean
from .defaults import without_autocast
from .errors import StateError
from .gather import gather_rows, whole_rows
from .kernels import top
from .methods import SCORES, Statistics
from .plan import new_selection
from .probe import sample_rows, too_short

if TYPE_CHECKING:
    from .plan import LayerInfo, Plan
    from .probe import ProbeRows
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
    from .probe import probe_channel_moment, probe_moment

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
        fused = fuse(p, history, state.config.fusion_epsilon)
        if rows.real is not None:  # a position without a real probe row says nothing
            fused = torch.where(rows.real.any(0)[:, None], fused, 0.0)
        p = torch.where(state.seen > 0, fused, p)
    seen = p.shape[0] if rows.real is None else rows.real.any(0).sum().clamp(min=1)
    mean = probe_channel_moment(z, rows, 1)
    if state.mean is not None:
        share = state.config.compensation_mix * state.seen
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


def reused(state: GroupState, plan: Plan) -> Selection | None:
    """The generation's selection, for a call that makes none; None means dense."""
    if plan.selects:
        return None
    selection = plan.stored.get(state.name)
    if selection is not None and not selection.compacts and state.holds_compact:
        selection.compacts = selection.inputs_due = selection.output_due = True
    return selection


def rows_ahead(state: GroupState, plan: Plan, *linears: Any) -> tuple[Tensor | None, ...]:
    """Of a group's fused input projections what can run before the selection is known.

    Args:
        linears: arguments of `gather_rows`.

    Returns:
        All of them where this call makes no selection; else the whole ones, and None for the pruned ones.
    """
    return whole_rows(*linears) if selects(state, plan) else gather_rows(reused(state, plan), *linears)


@without_autocast
def choose_units(state: GroupState, scores: Tensor | None, plan: Plan, layer: LayerInfo) -> Selection | None:
    """The selection of this call: made anew, or the generation's; None means that all units run (dense)."""
    if not selects(state, plan):
        selection = reused(state, plan)
        if selection is not None and scores is not None:
            return _reselect(state, scores, selection, plan)
        return selection
    if scores is None:
        if not state.calibrated:
            raise StateError(
                "probe=None chooses by the history, but the model is not calibrated; call pp_fx.calibrate first"
            )
        scores = history_scores(state, plan.exports)
    elif plan.exports and state.calibrated:
        scores = torch.where(too_short(state, plan), history_scores(state, True), scores)
    kept = top(scores, state.kept_units, plan.exports)
    selection = new_selection(layer, plan, state.name, kept, state.columns_of(kept))
    selection.compacts = plan.exports or (plan.keeps and state.holds_compact)
    limit = 0 if selection.compacts else state.config.kernel_rows
    selection.in_place = limit > 0 and plan.shape[0] * plan.shape[1] <= limit
    return selection


def _reselect(state: GroupState, scores: Tensor, selection: Selection, plan: Plan) -> Selection:
    """Take the selection of a re-probe; with a drift threshold only if it shares too few units with the old one."""
    kept, threshold, drifted = top(scores, state.kept_units, plan.exports), state.config.drift_threshold, None
    if threshold is not None:
        drifted = torch.isin(kept, selection.kept).float().mean() < threshold
        if not torch.compiler.is_compiling() and not bool(drifted):
            return selection
    selection.choose(kept, state.columns_of(kept), selection.version, drifted)
    return selection


@without_autocast
def compensate(
    state: GroupState,
    selection: Selection | None,
    z: Tensor | None,
    rows: ProbeRows | None,
    weight: Tensor,
    plan: Plan,
) -> Compensation | None:
    """What stands in for the dropped units; computed with the selection and kept with it."""
    if selection is None or state.compensation is None:
        return None
    if selection.uncompensated:
        return selection.compensate(_compensation(state, selection, z, rows, weight, plan))
    return selection.compensation  # None where compact weights hold it


def _compensation(
    state: GroupState, selection: Selection, z: Tensor | None, rows: ProbeRows | None, weight: Tensor, plan: Plan
) -> Compensation:
    config, name = state.config, state.compensation
    if (
        name == "least_squares"
        and not plan.exports
        and plan.shape[0] * _tokens(state, plan) < (config.compensation_min_tokens or 0)
    ):
        name = "mean"
    sampled: tuple[Tensor | None, Tensor | None] = None, None
    if z is not None and rows is not None:
        sampled = sample_rows(z, rows, config.compensation_rows, plan) if name == "least_squares" else _all(z, rows)
    variance, energy = None, state.energy
    if energy is not None and state.mean is not None:
        energy = energy.mean(0) if energy.ndim == 2 else energy
        variance = (energy - state.mean.square()).clamp(min=0)
    share = config.compensation_mix * state.seen
    if plan.exports and state.calibrated and sampled[0] is not None:
        share = torch.where(too_short(state, plan), 1.0, share)
    known = Known(selection.columns, state.mean, variance, state.directions, *sampled, share, plan.exports)
    if plan.exports and name == "least_squares":
        tokens = torch.scalar_tensor(plan.shape[0] * plan.shape[1], dtype=torch.int64)
        solves = tokens >= (config.compensation_min_tokens or 0)
        return least_squares_or_mean(solves, weight, known, config.compensation_ridge)
    return COMPENSATIONS[name](weight, known, config.compensation_ridge)  # type: ignore[index]


def _tokens(state: GroupState, plan: Plan) -> int:
    """Tokens of each sample that the selection is made for: of a re-probe those since the last one."""
    return plan.shape[1] if plan.selects else state.config.reprobe_every


def _all(z: Tensor, rows: ProbeRows) -> tuple[Tensor, Tensor | None]:
    """All probe rows [n, C] in fp32, and which are real [n]."""
    return z.float().flatten(0, 1), None if rows.real is None else rows.real.flatten()
