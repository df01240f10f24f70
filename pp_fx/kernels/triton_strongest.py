"""The Triton kernels of `strongest` for one token: they read the rows of its chosen channels where these lie.

Their number is known before the choice is, so CUDA graphs replay it. Four launches: the choice (`triton_top`), the up
projection, the output projection in slices of the channels, and the slices' sum. Several tokens choose nearly every
channel among them: for those the library's products run whole, and one kernel masks what lies between.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .triton_top import bound, top

_CHANNELS, _FEATURES, _STATE_WARPS = 8, 256, 4
"""Rows of the up projection that one program reads, so many features at a time."""
_SLICE, _ROWS, _COLUMNS, _OUTPUT_WARPS = 128, 8, 512, 2
"""Rows of the output projection that one program adds, so many at a time, and how wide."""


@triton.jit
def _state(kept, factor, x, up, bias, z, count, depth, stride,
           BIAS: tl.constexpr, C: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """z[i] = factor * (x . up + bias) of the i-th chosen channel."""
    i, k = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, K)
    inside = i < count
    c = tl.load(kept + i, mask=inside, other=0)
    total = tl.zeros((C, K), dtype=tl.float32)  # added up once, at the end
    for start in range(0, depth, K):
        near = start + k < depth
        rows = tl.load(up + c[:, None] * stride + (start + k)[None, :],
                       mask=inside[:, None] & near[None, :], other=0.0).to(tl.float32)  # fmt: skip
        total += rows * tl.load(x + start + k, mask=near, other=0.0).to(tl.float32)[None, :]
    made = tl.sum(total, 1)
    if BIAS:
        made += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    met = tl.load(factor + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(z + i, (met * made.to(z.dtype.element_ty).to(tl.float32)).to(z.dtype.element_ty), mask=inside)


@triton.jit
def _output(kept, z, down, partial, count, width, stride,
            SLICE: tl.constexpr, C: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """partial[slice, o] = sum over the slice's chosen channels of z * down[:, o]."""
    o = tl.program_id(0) * W + tl.arange(0, W)
    total = tl.zeros((C, W), dtype=tl.float32)
    first = tl.program_id(1) * SLICE
    for start in range(first, first + SLICE, C):
        i = start + tl.arange(0, C)
        inside = i < count
        c = tl.load(kept + i, mask=inside, other=0)
        rows = tl.load(down + c[:, None] * stride + o[None, :],
                       mask=inside[:, None] & (o[None, :] < width), other=0.0).to(tl.float32)  # fmt: skip
        total += rows * tl.load(z + i, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(partial + tl.program_id(1) * width + o, tl.sum(total, 0), mask=o < width)


@triton.jit
def _sum(partial, bias, out, slices, width, BIAS: tl.constexpr, S: tl.constexpr, W: tl.constexpr):
    """out[o] = sum over the slices, and the bias."""
    s, o = tl.arange(0, S), tl.program_id(0) * W + tl.arange(0, W)
    total = tl.zeros((S, W), dtype=tl.float32)
    for start in range(0, slices, S):
        total += tl.load(partial + (start + s)[:, None] * width + o[None, :],
                         mask=(start + s < slices)[:, None] & (o < width)[None, :], other=0.0)  # fmt: skip
    made = tl.sum(total, 0)
    if BIAS:
        made += tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)
    tl.store(out + o, made.to(out.dtype.element_ty), mask=o < width)


@triton.jit
def _masked(strength, z, out, channels, count, N: tl.constexpr):
    """z where a token's strength is among its `count` strongest, else 0; one program for each token."""
    c = tl.arange(0, N)
    inside = c < channels
    place = tl.program_id(0) * channels + c
    keys = tl.load(strength + place, mask=inside, other=0.0).to(tl.int32, bitcast=True)  # from 0 on, bits are in order
    chosen = inside & (keys >= bound(keys, inside, count))
    tl.store(out + place, tl.load(z + place, mask=chosen, other=0.0), mask=inside)


def strongest(
    strength: Tensor,
    factor: Tensor,
    x: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    count: int,
) -> Tensor:
    """As `pp_fx.kernels.strongest.strongest`; of one token exactly `count` channels, of equal ones the first."""
    if len(x) > 1:
        z = factor if up is None else factor * F.linear(x, up, up_bias)
        return F.linear(masked(strength, z, count), down.t(), down_bias)
    kept, width = top(strength.float()[0], count), down.shape[1]
    if up is None:
        z = factor[0, kept]
    else:
        z = factor.new_empty(count)
        _state[(triton.cdiv(count, _CHANNELS),)](
            kept, factor.contiguous(), x.contiguous(), up, x if up_bias is None else up_bias, z, count, x.shape[1],
            up.stride(0), BIAS=up_bias is not None, C=_CHANNELS, K=_FEATURES, num_warps=_STATE_WARPS,
        )  # fmt: skip
    slices = triton.cdiv(count, _SLICE)
    partial, out = strength.new_empty(slices, width, dtype=torch.float32), factor.new_empty(1, width)
    _output[(triton.cdiv(width, _COLUMNS), slices)](
        kept, z, down, partial, count, width, down.stride(0), SLICE=_SLICE, C=_ROWS, W=_COLUMNS,
        num_warps=_OUTPUT_WARPS,
    )  # fmt: skip
    _sum[(triton.cdiv(width, 32),)](
        partial, z if down_bias is None else down_bias, out, slices, width, BIAS=down_bias is not None, S=16, W=32
    )
    return out


def masked(strength: Tensor, z: Tensor, count: int) -> Tensor:
    """As `pp_fx.kernels.strongest.masked`: strength [N, C] at least 0, z [N, C]."""
    channels, out = strength.shape[1], torch.empty_like(z)
    padded = max(16, triton.next_power_of_2(channels))
    _masked[(len(z),)](
        strength.float().contiguous(), z.contiguous(), out, channels, count, N=padded,
        num_warps=min(32, max(1, padded // 512)),
    )  # fmt: skip
    return out
