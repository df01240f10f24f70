"""The history: running statistics of every channel, updated inside the graph (paper, section 3.2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .defaults import without_autocast
from .gram import gram_sums
from .padding import add_padded
from .probe import first_real, left_aligned, probe_channel_moment, probe_moment, too_short
from .state import states_of

if TYPE_CHECKING:
    from .cache import Selection
    from .plan import Plan
    from .probe import ProbeRows
    from .state import GroupState


@without_autocast
def update_history(
    state: GroupState,
    z: Tensor,
    selection: Selection | None,
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
    z = z.reshape(*plan.shape, -1)
    if state.mode == "calibrate":
        if state.prunes:
            _accumulate(state, z, real)
            if state.gram is not None:
                for key, value in gram_sums(z, residual, real, weight, state.units).items():
                    state.sums[key] = value.double() + state.sums.get(key, 0)
        return
    if state.energy is None or state.mean is None or state.mode == "frozen":
        return
    if selection is None or probe is None or rows is None:
        return
    columns = selection.columns
    z, probe = z.detach(), probe.detach()
    gram = None if gram is None else gram.detach()
    if state.energy.ndim == 1:
        flat, mask = _spaced_rows(z, real, state.config.history_rows)
        new_energy, new_mean, any_row = _moments(flat, mask, 0)
        first_energy = probe_channel_moment(probe, rows, 2)
        target = state.energy
    else:
        last = state.energy.shape[0]
        new_energy, new_mean, any_row = _position_moments(z, real, last)
        target = state.energy[: new_energy.shape[0]]
        first_energy = probe_moment(probe, rows, 2).mean(0).expand_as(target)
    seen, momentum = state.seen > 0, state.config.momentum
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
    z, real = _by_position(z, real)
    z, real = z[:, :length], None if real is None else real[:, :length]
    energy, _, any_row = _moments(z, real, 0)
    _, mean, _ = _moments(z.flatten(0, 1), None if real is None else real.flatten(), 0)
    return energy, mean, any_row


def _by_position(z: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """States [B, T, k] as the probe counts positions: from each sample's first real token."""
    if real is None:
        return z, None
    start = first_real(real)
    return left_aligned(z, start), left_aligned(real, start)


def _accumulate(state: GroupState, z: Tensor, real: Tensor | None) -> None:
    """Add a calibration batch [B, T, C] to the sums and the sketch of `calibrate`."""
    if state.sketch is not None:
        state.sketch.add(z.flatten(0, 1), None if real is None else real.flatten())
    per_position = state.energy is not None and state.energy.ndim == 2
    if per_position:
        z, real = _by_position(z, real)
    z = z.float()
    if real is not None:
        z = torch.where(real.unsqueeze(-1), z, 0.0)
    dims = (0,) if per_position else (0, 1)
    counts = torch.ones(z.shape[:2], dtype=torch.float32, device=z.device) if real is None else real.float()
    for key, value in (("energy", z.pow(2).sum(dims)), ("count", counts.sum(dims)), ("mean", z.sum((0, 1)))):
        old = state.sums.get(key)
        state.sums[key] = value.double() if old is None else add_padded(old, value.double())


@contextlib.contextmanager
def history_frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the context, forward passes select but leave the history as it is.

    ```python
    with pp_fx.history_frozen(model):
        model(**inputs)
    ```

    Args:
        model: a transformed model; of any other nothing changes.

    Yields:
        The model.
    """
    states = states_of(model)
    before = [s.mode for s in states]
    try:
        for s in states:
            s.mode = "frozen"
        yield model
    finally:
        for s, mode in zip(states, before, strict=True):
            s.mode = mode
