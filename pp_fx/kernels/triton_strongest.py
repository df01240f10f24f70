"""The Triton kernels of `strongest`: a row of a weight is loaded only if a token of the call has chosen its channel.

Nothing is compacted, so every size is known before the choice is and CUDA graphs replay it: a program whose channels
nobody has chosen loads nothing. Three launches: each token's bound, the up projection, the output projection in slices
of the channels, whose partial sums torch adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CHANNELS = 65536
"""Strengths of one token that one program holds in registers."""
_NUMBERS = 4096
"""Of one tile of products: tokens x channels x features."""
_FEATURES = 128
_SLICE = 512
"""Channels whose output rows one program adds."""


@triton.jit
def _least(strength, least, channels, count, N: tl.constexpr):
    """A token's `count`-th largest strength, by bisection of the bits: of numbers from 0 on they are in order."""
    c = tl.arange(0, N)
    inside = c < channels
    keys = tl.load(strength + tl.program_id(0) * channels + c, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    low = tl.min(tl.where(inside, keys, 2147483647), 0)
    high = tl.max(tl.where(inside, keys, 0), 0)
    while low < high:  # the largest bound that at least `count` strengths reach
        middle = low + (high - low + 1) // 2
        reached = tl.sum((inside & (keys >= middle)).to(tl.int32), 0) >= count
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    tl.store(least + tl.program_id(0), low.to(tl.float32, bitcast=True))


@triton.jit
def _state(strength, least, factor, x, up, bias, z, tokens, channels, depth, stride,
           GATED: tl.constexpr, BIAS: tl.constexpr, T: tl.constexpr, C: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """z[t, c] = factor * (x . up_c + bias_c) where token t has chosen c, else 0."""
    t, c, k = tl.arange(0, T), tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, K)
    place = t[:, None] * channels + c[None, :]
    inside = (t[:, None] < tokens) & (c[None, :] < channels)
    force = tl.load(strength + place, mask=inside, other=0.0)
    bound = tl.load(least + t, mask=t < tokens, other=0.0)
    chosen = inside & (force >= bound[:, None]) & (force > 0)
    made = tl.load(factor + place, mask=chosen, other=0.0).to(tl.float32)
    if GATED:
        wanted = tl.max(chosen.to(tl.int32), 0) > 0
        total = tl.zeros((T, C), dtype=tl.float32)
        for start in range(0, depth, K):
            near = start + k < depth
            rows = tl.load(up + c[:, None].to(tl.int64) * stride + (start + k)[None, :],
                           mask=wanted[:, None] & near[None, :], other=0.0).to(tl.float32)  # fmt: skip
            part = tl.load(x + t[:, None] * depth + (start + k)[None, :],
                           mask=(t[:, None] < tokens) & near[None, :], other=0.0).to(tl.float32)  # fmt: skip
            total += tl.sum(part[:, None, :] * rows[None, :, :], 2)
        if BIAS:
            total += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        made = made * total.to(z.dtype.element_ty).to(tl.float32)
    tl.store(z + place, tl.where(chosen, made, 0.0).to(z.dtype.element_ty), mask=inside)


@triton.jit
def _output(z, down, partial, tokens, channels, width, stride,
            SLICE: tl.constexpr, T: tl.constexpr, C: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """partial[slice, t, o] = sum over the slice's channels of z[t, c] * down[c, o]."""
    t, o = tl.arange(0, T), tl.program_id(0) * W + tl.arange(0, W)
    total = tl.zeros((T, W), dtype=tl.float32)
    first = tl.program_id(1) * SLICE
    for start in range(first, first + SLICE, C):
        c = start + tl.arange(0, C)
        part = tl.load(z + t[:, None] * channels + c[None, :], mask=(t[:, None] < tokens) & (c[None, :] < channels),
                       other=0.0).to(tl.float32)  # fmt: skip
        wanted = tl.max((part != 0).to(tl.int32), 0) > 0
        rows = tl.load(down + c[:, None].to(tl.int64) * stride + o[None, :],
                       mask=wanted[:, None] & (o[None, :] < width), other=0.0).to(tl.float32)  # fmt: skip
        total += tl.sum(part[:, :, None] * rows[None, :, :], 1)
    place = (tl.program_id(1) * tokens + t[:, None]) * width + o[None, :]
    tl.store(partial + place, total, mask=(t[:, None] < tokens) & (o[None, :] < width))


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
    """As `pp_fx.kernels.strongest.strongest`."""
    tokens, channels = strength.shape
    strength, factor, x = strength.float().contiguous(), factor.contiguous(), x.contiguous()
    least = strength.new_empty(tokens)
    padded = max(16, triton.next_power_of_2(channels))
    _least[(tokens,)](strength, least, channels, count, N=padded, num_warps=min(32, max(1, padded // 512)))
    rows = triton.next_power_of_2(tokens)
    z, together = torch.empty_like(factor), max(1, _NUMBERS // (rows * _FEATURES))
    _state[(triton.cdiv(channels, together),)](
        strength, least, factor, x, x if up is None else up, x if up_bias is None else up_bias, z, tokens, channels,
        x.shape[1], 0 if up is None else up.stride(0), GATED=up is not None, BIAS=up_bias is not None, T=rows,
        C=together, K=_FEATURES,
    )  # fmt: skip
    width, slices = down.shape[1], triton.cdiv(channels, _SLICE)
    partial = strength.new_empty(slices, tokens, width)
    _output[(triton.cdiv(width, _FEATURES), slices)](
        z, down, partial, tokens, channels, width, down.stride(0), SLICE=_SLICE, T=rows, C=together, W=_FEATURES
    )
    out = partial.sum(0)
    return (out if down_bias is None else out + down_bias).to(factor.dtype)
