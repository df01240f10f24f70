"""What stands in for the dropped units of a call, from what probe and history know."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import is_plain
from ..methods import COMPENSATIONS, Compensation, Known
from ..methods.compensations import least_squares_or_mean
from ..process_settings import without_autocast
from .plan import Plan
from .probe import ProbeRows, sample_rows, too_short
from .selections import Selection
from .state import GroupState


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
        return selection.compensate(_compensation(state, selection, z, rows, weight, plan), is_plain(weight))
    return selection.compensation  # None where compact weights hold it


def _compensation(
    state: GroupState, selection: Selection, z: Tensor | None, rows: ProbeRows | None, weight: Tensor, plan: Plan
) -> Compensation:
    settings, name = plan.settings, state.compensation
    if (
        name == "least_squares"
        and not (plan.exports or plan.once)
        and plan.shape[0] * _tokens(state, plan) < (settings.compensation_min_tokens or 0)
    ):
        name = "mean"
    sampled: tuple[Tensor | None, Tensor | None] = None, None
    if z is not None and rows is not None:
        sampled = sample_rows(z, rows, settings.compensation_rows, plan) if name == "least_squares" else _all(z, rows)
    variance, energy = None, state.energy
    if energy is not None and state.mean is not None:
        energy = energy.mean(0) if energy.ndim == 2 else energy
        variance = (energy - state.mean.square()).clamp(min=0)
    share = settings.compensation_mix * state.seen
    if plan.exports and state.calibrated and sampled[0] is not None:
        share = torch.where(too_short(state, plan), 1.0, share)
    known = Known(selection.columns, state.mean, variance, state.directions, *sampled, share, plan.exports)
    if plan.exports and name == "least_squares":
        tokens = torch.scalar_tensor(plan.shape[0] * plan.shape[1], dtype=torch.int64)
        solves = tokens >= (settings.compensation_min_tokens or 0)
        return least_squares_or_mean(solves, weight, known, settings.compensation_ridge)
    return COMPENSATIONS[name](weight, known, settings.compensation_ridge)  # type: ignore[index]


def _tokens(state: GroupState, plan: Plan) -> int:
    """Tokens of each sample that the selection is made for: of a re-probe those since the last one."""
    return plan.shape[1] if plan.selects else plan.settings.reprobe_every


def _all(z: Tensor, rows: ProbeRows) -> tuple[Tensor, Tensor | None]:
    """All probe rows [n, C] in fp32, and which are real [n]."""
    return z.float().flatten(0, 1), None if rows.real is None else rows.real.flatten()
