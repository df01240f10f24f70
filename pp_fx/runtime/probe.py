"""The probe: which rows of the residual run ahead, and their run through the branch (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import few_rows, top
from ..probe_config import ceil_share
from .buffers import keep
from .plan import LayerInfo, Plan, exports
from .selections import put_selections
from .state import GroupState

_LARGEST = 1e9


class ProbeRows(NamedTuple):
    """The same positions of some samples. Lists are ascending.

    Attributes:
        samples: int64 [B'], or None for all samples.
        positions: int64 [T'], counted from each sample's first real token.
        real: bool [B', T'], or None when every row holds a real token.
        columns: int64 [B', T'], where the positions lie in the batch; None where all samples begin in column 0.
    """

    samples: Tensor | None
    positions: Tensor
    real: Tensor | None
    columns: Tensor | None = None


def probe_source(state: GroupState, residual: Tensor, plan: Plan, layer: LayerInfo) -> Tensor:
    """What the probe looks at: the residual [B, T, H] of this call, or for a re-probe that of the last tokens.

    While decoding, a group that re-probes keeps the residual of the last `reprobe_every` tokens on the KV cache; the
    prompt makes room for it.
    """
    decodes = state.kind in plan.stored and not plan.selects
    if not state.reprobes or plan.engine is not None or not (decodes or plan.keeps):
        return residual
    decoded = residual if decodes else residual[:, :0]
    window = keep_window(state, decoded, layer, plan.cache, plan.settings.reprobe_every)
    return window if decodes and plan.reprobes else residual


def keep_window(state: GroupState, decoded: Tensor, layer: LayerInfo, cache: Any, size: int) -> Tensor:
    """Keep the residual of the last `size` tokens on a cache: [B, size, H], zeros before there were so many.

    Args:
        decoded: [B, T, H], of the tokens that come now.
    """
    windows = put_selections(cache, layer.owner).windows
    if layer.index not in windows:
        windows[layer.index] = {}
    groups = windows[layer.index]
    window = groups.get(state.kind)
    if window is None or window.shape[0] != decoded.shape[0]:
        window = decoded.new_zeros((decoded.shape[0], size, decoded.shape[2]))
    if decoded.shape[1]:
        window = torch.cat([window, decoded], 1)[:, -size:]
    groups[state.kind] = keep(groups.get(state.kind), window)
    return window


def choose_rows(state: GroupState, source: Tensor, real: Tensor | None, plan: Plan) -> ProbeRows | None:
    """Rank positions, then samples, of the residual [B, T, H] (`ProbeConfig.ranking`); padded rows rank last.

    Positions count from each sample's first real token, on whichever side it is padded; how many there are is a share
    of the batch's width, padding included.

    Returns:
        The probe's rows, or None when this call needs no probe: the layer is dense here, calibration is running, the
        call reuses the generation's selection, the history alone decides once and for all, or the prompt is shorter
        than `min_select_tokens` and the model is calibrated (then the history alone decides: a probe would cost more
        than its share of so short a call). A re-probe takes all rows of its window.
    """
    if plan.reprobes and state.reprobes:
        return ProbeRows(None, torch.arange(source.shape[1], device=source.device), None)
    if not plan.selects or not state.prunes or state.mode == "calibrate":
        return None
    batch, length = source.shape[0], source.shape[1]
    settings = plan.settings.probe
    if settings is None or plan.once:
        return None
    if state.calibrated and not plan.exports and length < plan.settings.min_select_tokens:
        return None  # an exported graph serves every length: it decides by `too_short`
    energy, start = None, None
    if settings.ranking != "even":
        energy = _energy(source, state.reach)
        energy = torch.where(energy.isfinite(), energy, 0.0)
    if real is not None:
        start = first_real(real)
        real = left_aligned(real, start)
        energy = None if energy is None else torch.where(real, left_aligned(energy, start), 0.0)
    smaller, larger = _bounds(plan)
    wanted = smaller(length, larger(settings.min_positions, ceil_share(length, settings.token_fraction)))
    first = settings.first_position == "always" or (settings.first_position == "few" and wanted <= 10)
    if energy is None:
        longest = length if real is None else real.any(0).sum()  # however wide the batch was padded
        positions = _evenly(longest, wanted, source.device)
        positions = torch.where(positions == positions[0], 0, positions) if first else positions
    else:
        rank = energy.sum(0)
        if first:
            rank = torch.where(torch.arange(length, device=rank.device) == 0, torch.inf, rank)
        positions = top(rank, wanted, plan.exports)
    samples = None
    if settings.sample_fraction < 1:
        count = larger(1, ceil_share(batch, settings.sample_fraction))
        if energy is None:
            samples = _evenly(batch, count, source.device)
        else:
            samples = top(energy.index_select(1, positions).sum(1), count, plan.exports)
    if real is None or start is None:
        return ProbeRows(samples, positions, None)
    real = real.index_select(1, positions)
    if samples is not None:
        real, start = real.index_select(0, samples), start.index_select(0, samples)
    columns = (positions + start[:, None]).clamp(max=length - 1)
    return ProbeRows(samples, positions, real, columns)


def first_real(real: Tensor) -> Tensor:
    """The column of each sample's first real token, of bool [B, T]: int64 [B]; 0 where no token is real."""
    return real.int().argmax(1)


def left_aligned(tensor: Tensor, start: Tensor) -> Tensor:
    """[B, T, ...] with every sample moved to the left by its `start` [B]; what then lies at the end is zero."""
    length = tensor.shape[1]
    columns = torch.arange(length, device=tensor.device) + start[:, None]
    shape = (*columns.shape, *(1 for _ in tensor.shape[2:]))
    moved = tensor.gather(1, columns.clamp(max=length - 1).view(shape).expand(tensor.shape))
    inside = (columns < length).view(shape)
    # onnxruntime chooses no booleans
    return inside & moved if moved.dtype == torch.bool else torch.where(inside, moved, moved.new_zeros(()))


def too_short(state: GroupState, plan: Plan) -> Tensor:
    """Bool scalar of an exported graph: the prompt is too short for a probe, so the history alone decides."""
    return torch.scalar_tensor(plan.shape[1], dtype=torch.int64) < plan.settings.min_select_tokens


def _evenly(total: Any, count: Any, device: torch.device) -> Tensor:
    """The middles of `count` equal parts of 0 .. total - 1: int64 [count], ascending, distinct if enough."""
    middles: Tensor = (2 * torch.arange(count, device=device) + 1) * total // (2 * count)
    return middles


def _energy(source: Tensor, reach: Tensor | None) -> Tensor:
    """The squared norm of every row of [B, T, H], its features weighted by `reach` [H]: fp32 (or fp64) [B, T]."""
    dtype = torch.promote_types(source.dtype, torch.float32)
    if reach is not None:
        return source.to(dtype).square() @ reach.to(dtype)
    if torch.compiler.is_dynamo_compiling():  # written out it shares one pass over the rows with the layer's own norm
        return source.to(dtype).square().sum(-1)
    norm: Tensor = torch.linalg.vector_norm(source, dim=-1, dtype=dtype)
    return norm.square()


def _bounds(plan: Plan) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """min and max of sizes; in an exported graph those of symbols, which torch 2.11 cannot compile."""
    return (torch.sym_min, torch.sym_max) if plan.exports else (min, max)


def take_rows(tensor: Tensor, rows: ProbeRows | None) -> Tensor | None:
    """The probe's rows of a [B, T, ...] tensor (or [1, T, ...], shared by all samples): [B', T', ...]."""
    if rows is None:
        return None
    if rows.columns is not None:
        return _take_columns(tensor, rows, 1)
    if rows.samples is not None and tensor.shape[0] != 1:
        tensor = tensor.index_select(0, rows.samples)
    return tensor.index_select(1, rows.positions)


def _take_columns(tensor: Tensor, rows: ProbeRows, dim: int) -> Tensor:
    """`rows.columns` of each sample of a [B or 1, .., T, ..] tensor whose columns lie along `dim`: [B', .., T', ..]."""
    columns, length = rows.columns, tensor.shape[dim]
    assert columns is not None
    flat = tensor.movedim(dim, 1).flatten(0, 1)
    if tensor.shape[0] != 1:
        sample = torch.arange(columns.shape[0], device=columns.device) if rows.samples is None else rows.samples
        columns = columns + sample[:, None] * length
    taken: Tensor = flat.index_select(0, columns.flatten()).unflatten(0, columns.shape)
    return taken.movedim(1, dim)


def take_samples(tensor: Tensor, rows: ProbeRows | None) -> Tensor | None:
    """The probe's samples of a [B, ...] tensor: [B', ...]."""
    if rows is None:
        return None
    return tensor if rows.samples is None else tensor.index_select(0, rows.samples)


def query_mask(
    rows: ProbeRows | None,
    mask: Tensor | None,
    residual: Tensor | None,
    keys: Tensor,
    plan: Plan,
    window: int | None,
    module: Any,
) -> Tensor | None:
    """The attention mask of the probe rows against all keys [B, heads, S, D]: [1 or B', 1, T', S].

    Args:
        mask: the batch's: [B or 1, 1, T, S] of any kind, of which the rows are taken; None (causal) or [B, S] (flash
            attention), for which an additive one is made.
        window: sliding window of the attention where the mask does not hold it.
        module: the attention module. Without a mask, flash attention sees a call's tokens as the last of the keys, and
            SDPA (`is_causal`) as the first: a StaticCache is longer than what it holds.
    """
    if rows is None or residual is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 4:
        if rows.columns is not None:
            return _take_columns(mask, rows, 2)
        if rows.samples is not None and mask.shape[0] != 1:
            mask = mask.index_select(0, rows.samples)
        return mask.index_select(2, rows.positions)
    key = torch.arange(keys.shape[2], device=keys.device)
    flash = module is not None and "flash" in module.config._attn_implementation
    columns = rows.positions[None] if rows.columns is None else rows.columns
    query = columns[..., None] + (keys.shape[2] - plan.shape[1] if flash else 0)
    allowed = (key <= query) if window is None else (key <= query) & (key > query - window)
    if mask is not None:
        real = take_samples(mask, rows)[:, None, -keys.shape[2] :] != 0  # type: ignore[index]
        allowed = (allowed & real) | (key == query)
    return _additive(allowed, residual)


def probe_mask(rows: ProbeRows | None, residual: Tensor | None) -> Tensor | None:
    """Additive causal mask among the probe rows, padded keys excluded: [1 or B', 1, T', T'] in the residual's dtype."""
    if rows is None or residual is None:
        return None
    allowed = (rows.positions[:, None] >= rows.positions[None, :])[None]
    if rows.real is not None:
        # a row may always see itself, so that no row of the softmax is empty
        own = (rows.positions[:, None] == rows.positions[None, :])[None]
        allowed = (allowed & rows.real[:, None, :]) | own
    return _additive(allowed, residual)


def _additive(allowed: Tensor, residual: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=residual.dtype, device=residual.device)
    return torch.where(allowed, zero, torch.finfo(residual.dtype).min)[:, None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear layers of a probe: x [..., in], weight [out, in] -> [..., out]."""
    return F.linear(x, weight, bias) if exports() else few_rows(x, weight, bias)


def probe_state(state: GroupState, inputs: tuple[Any, ...], parameters: tuple[Any, ...]) -> Tensor | None:
    """The branch's intermediate state of the probe rows, [B', T', C]; None without a probe.

    Values that are not finite, or so large that sums of their squares would not be, count as zero: one sample that has
    gone wrong must not decide for the others of its batch.
    """
    residual = inputs[0]
    if residual is None:
        return None
    # some layers flatten batch and time before the branch
    z = state.probe(state, *inputs, *parameters).reshape(residual.shape[0], residual.shape[1], -1)
    return torch.where(z.abs() <= min(_LARGEST, torch.finfo(z.dtype).max), z, 0.0)


def sample_rows(tensor: Tensor, rows: ProbeRows, limit: int, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """At most `limit` evenly spaced probe rows of [B', T', ..] in fp32 [n, ..], and which are real [n]."""
    count = tensor.shape[0] * tensor.shape[1]
    taken = _bounds(plan)[0](count, limit)
    index = torch.arange(taken, device=tensor.device) * count // taken
    real = None if rows.real is None else rows.real.flatten().index_select(0, index)
    return tensor.flatten(0, 1).index_select(0, index).float(), real


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
