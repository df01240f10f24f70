"""The probe: which rows of the residual run ahead, and their run through the branch (paper, section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import ceil_share
from .selection import stored
from .state import GroupState


class ProbeRows(NamedTuple):
    """A rectangle of rows. Lists are ascending.

    Attributes:
        samples: int64 [B'], or None for all samples.
        positions: int64 [T'].
        real: bool [B', T'], or None when every row holds a real token.
    """

    samples: Tensor | None
    positions: Tensor
    real: Tensor | None


def choose_rows(state: GroupState, residual: Tensor, real: Tensor | None, cache, layer) -> ProbeRows | None:
    """Rank positions, then samples, by the norm of the residual [B, T, H]; padded rows rank last.

    Returns:
        The probe's rows, or None when this call needs no probe: the layer is dense here, calibration is running, or
        the call continues a KV cache that holds a selection with fewer than `min_select_tokens` tokens.
    """
    batch, length = residual.shape[0], residual.shape[1]
    if not state.prunes or state.mode == "calibrate":
        return None
    if length < state.config.min_select_tokens and stored(cache, layer, state.name) is not None:
        return None
    settings = state.config.probe
    norm = torch.linalg.vector_norm(residual, dim=-1, dtype=torch.float32)
    if real is not None:
        norm = torch.where(real, norm, 0.0)
    wanted = torch.sym_min(length, torch.sym_max(settings.min_positions, ceil_share(length, settings.token_fraction)))
    positions = norm.norm(dim=0).topk(wanted).indices
    if settings.first_position == "always" or (settings.first_position == "few" and wanted <= 10):
        positions = with_first(positions)
    positions = positions.sort().values
    samples = None
    if settings.sample_fraction < 1:
        count = torch.sym_max(1, ceil_share(batch, settings.sample_fraction))
        samples = norm.index_select(1, positions).norm(dim=1).topk(count).indices.sort().values
    if real is not None:
        real = real.index_select(1, positions)
        real = real if samples is None else real.index_select(0, samples)
    return ProbeRows(samples, positions, real)


def with_first(ranked: Tensor) -> Tensor:
    """Position 0 in place of the lowest ranked pick, unless it is picked already."""
    has_first = (ranked == 0).any()
    last = torch.where(has_first, ranked[-1:], torch.zeros_like(ranked[-1:]))
    return torch.cat([ranked[:-1], last])


def take_rows(tensor: Tensor, rows: ProbeRows | None) -> Tensor | None:
    """The probe's rows of a [B, T, ...] tensor (or [1, T, ...], shared by all samples): [B', T', ...]."""
    if rows is None:
        return None
    if rows.samples is not None and tensor.shape[0] != 1:
        tensor = tensor.index_select(0, rows.samples)
    return tensor.index_select(1, rows.positions)


def probe_mask(rows: ProbeRows | None, residual: Tensor | None) -> Tensor | None:
    """Additive causal mask among the probe rows, padded keys excluded: [1 or B', 1, T', T'] in the residual's dtype."""
    if rows is None or residual is None:
        return None
    allowed = (rows.positions[:, None] >= rows.positions[None, :])[None]
    if rows.real is not None:
        # a row may always see itself, so that no row of the softmax is empty
        own = (rows.positions[:, None] == rows.positions[None, :])[None]
        allowed = (allowed & rows.real[:, None, :]) | own
    zero = torch.zeros((), dtype=residual.dtype, device=residual.device)
    return torch.where(allowed, zero, torch.finfo(residual.dtype).min)[:, None]


def probe_state(state: GroupState, inputs: tuple, parameters: tuple) -> Tensor | None:
    """The branch's intermediate state of the probe rows, [B', T', C]; None without a probe."""
    return None if inputs[0] is None else state.probe(state, *inputs, *parameters)


def probe_moment(z: Tensor, rows: ProbeRows, power: int) -> Tensor:
    """Mean of z or z^2 over the probe's real samples, per position: fp32 [T', C]; 0 where no sample is real."""
    z = z.float()
    z = z.pow(2) if power == 2 else z
    if rows.real is None:
        return z.mean(0)
    weight = rows.real.to(z.dtype).unsqueeze(-1)
    # where, not a product: padded rows may hold Inf or NaN
    total = torch.where(rows.real.unsqueeze(-1), z, 0.0).sum(0)
    return total / weight.sum(0).clamp(min=1)


def probe_channel_moment(z: Tensor, rows: ProbeRows, power: int) -> Tensor:
    """Mean of z or z^2 over all real probe rows: fp32 [C]."""
    z = z.float()
    z = z.pow(2) if power == 2 else z
    if rows.real is None:
        return z.mean((0, 1))
    total = torch.where(rows.real.unsqueeze(-1), z, 0.0).sum((0, 1))
    return total / rows.real.sum().clamp(min=1)
