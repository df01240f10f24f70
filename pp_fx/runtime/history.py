"""The history: running statistics of every channel, updated inside the graph (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..process_settings import without_autocast
from .plan import Plan
from .probe import ProbeRows, first_real, left_aligned, probe_channel_moment, probe_moment, too_short
from .selections import Selection
from .state import GroupState


@without_autocast
def update_history(
    state: GroupState,
    z: Tensor,
    selection: Selection | None,
    *,
    real: Tensor | None,
    probe: Tensor | None,
    rows: ProbeRows | None,
    gram: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    plan: Plan,
) -> None:
    """Moving average of z and z^2 of the channels that ran; called once per probing call.

    The first batch starts the history: with the probe's statistics for the dropped channels. A batch whose
    statistics are not finite, or without a real row, leaves the history as it was.

    Args:
        z: [B, T, kept columns] or [B * T, kept columns], input of the output projection (all columns during
            calibration).
        real: bool [B, T] or None.
        probe: probe state [B', T', C] or None.
        gram: of the probe, or None.
        residual: [B, T, H], and weight: output projection [H, C]; calibration takes the Gram matrix of all rows.
    """
    if not plan.selects:
        return
    if state.mode == "calibrate":
        if state.collector is not None:
            state.collector.add(z.reshape(*plan.shape, -1), residual, real, weight)
        return
    if state.energy is None or state.mean is None or state.mode == "frozen":
        return
    if selection is None or probe is None or rows is None:
        return
    columns = selection.columns
    z, probe = z.reshape(*plan.shape, -1).detach(), probe.detach()
    gram = None if gram is None else gram.detach()
    if state.energy.ndim == 1:
        flat, mask = _spaced_rows(z, real, plan.settings.history_rows)
        new_energy, new_mean, any_row = _moments(flat, mask, 0)
        first_energy = probe_channel_moment(probe, rows, 2)
        target = state.energy
    else:
        last = state.energy.shape[0]
        new_energy, new_mean, any_row = _position_moments(z, real, last)
        target = state.energy[: new_energy.shape[0]]
        first_energy = probe_moment(probe, rows, 2).mean(0).expand_as(target)
    seen, momentum = state.seen > 0, plan.settings.momentum
    old_energy, old_mean = target.index_select(-1, columns), state.mean.index_select(0, columns)
    energy = torch.where(seen & any_row, momentum * old_energy + (1 - momentum) * new_energy, new_energy)
    energy = torch.where(any_row, energy, old_energy)
    mean = torch.where(seen, momentum * old_mean + (1 - momentum) * new_mean, new_mean)
    finite = energy.isfinite().all() & mean.isfinite().all() & any_row.any()
    base_energy = torch.where(seen, target, first_energy)
    base_mean = torch.where(seen, state.mean, probe_channel_moment(probe, rows, 1))
    if plan.empty is not None:
        finite = finite & plan.empty
    if plan.exports and state.calibrated:
        finite = finite & ~too_short(state, plan)  # as no call without a probe teaches
    finite = finite & base_energy.isfinite().all() & base_mean.isfinite().all()
    if state.gram is not None and gram is not None:
        finite = finite & gram.isfinite().all()
        new_gram = torch.where(seen, momentum * state.gram + (1 - momentum) * gram, gram)
        state.gram.copy_(torch.where(finite, new_gram, state.gram))
    target.copy_(torch.where(finite, base_energy.index_copy(-1, columns, energy), target))
    state.mean.copy_(torch.where(finite, base_mean.index_copy(0, columns, mean), state.mean))
    state.seen.copy_(torch.where(finite, 1.0, state.seen))


def _spaced_rows(z: Tensor, real: Tensor | None, limit: int) -> tuple[Tensor, Tensor | None]:
    """At most `limit` evenly spaced rows of [B, T, k] as [n, k], and which of them are real."""
    flat = z.flatten(0, 1)
    step = (flat.shape[0] + limit - 1) // limit
    return flat[::step], None if real is None else real.flatten()[::step]


def _moments(flat: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of z^2 and of z over `dim` in fp32, and whether any row counted (broadcastable to the result)."""
    flat = flat.float()
    if mask is None:
        return flat.pow(2).mean(dim), flat.mean(dim), torch.ones((), dtype=torch.bool, device=flat.device)
    flat = torch.where(mask.unsqueeze(-1), flat, 0.0)
    count = mask.sum(dim).unsqueeze(-1)
    divisor = count.clamp(min=1)
    return flat.pow(2).sum(dim) / divisor, flat.sum(dim) / divisor, count > 0


def _position_moments(z: Tensor, real: Tensor | None, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_moments` of the first `length` positions, the energy per position [T, k], the mean over all rows [k]."""
    z, real = by_position(z, real)
    z, real = z[:, :length], None if real is None else real[:, :length]
    energy, _, any_row = _moments(z, real, 0)
    _, mean, _ = _moments(z.flatten(0, 1), None if real is None else real.flatten(), 0)
    return energy, mean, any_row


def by_position(z: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """States [B, T, k] as the probe counts positions: from each sample's first real token."""
    if real is None:
        return z, None
    start = first_real(real)
    return left_aligned(z, start), left_aligned(real, start)
