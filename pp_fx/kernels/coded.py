"""A copy of a linear layer in 8 or 4 bits, good enough to rank its results: `pp_fx::coded_rows`.

64 features of a row share a scale, which their largest number sets; the input is rounded to 8 bits in the same way, so
that products are integers. A CPU's native kernel reads the codes where they lie; elsewhere they are widened first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .native_kernels import TYPES, native

GROUP = 64
"""Features that share a scale."""


class Coded(NamedTuple):
    """A weight [C, H] in codes: int8 [C, groups * 64], or two of 4 bits in a uint8 [C, groups * 32]; scales bf16."""

    codes: Tensor
    scales: Tensor


@torch.no_grad()
def encode(weight: Tensor, bits: int) -> Coded:
    """A weight [C, H] in codes of 8 or 4 bits, with scales [C, ceil(H / 64)]."""
    rows, width = weight.shape
    groups = -(-width // GROUP)
    padded = F.pad(weight.float(), (0, groups * GROUP - width)).view(rows, groups, GROUP)
    largest = 2 ** (bits - 1) - 1
    scales = (padded.abs().amax(-1) / largest).bfloat16()
    codes = (padded / scales.float().clamp(min=1e-30).unsqueeze(-1)).round().clamp(-largest - 1, largest)
    if bits == 8:
        return Coded(codes.to(torch.int8).flatten(1), scales)
    low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
    return Coded((low | high << 4).flatten(1), scales)


def decode(coded: Coded) -> Tensor:
    """The weight in fp32 [C, groups * 64]."""
    codes, scales = coded
    grouped = codes.view(*scales.shape, -1)
    packed = codes.dtype == torch.uint8
    numbers = torch.cat([grouped & 15, grouped >> 4], -1).float() - 8 if packed else grouped.float()
    return (numbers * scales.float().unsqueeze(-1)).flatten(1)


def rounded(x: Tensor) -> Tensor:
    """x [N, H] as the products see it: fp32, every group of a row in 8 bits; 0 where a group is not finite."""
    width = x.shape[1]
    groups = F.pad(x.float(), (0, -width % GROUP)).unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    whole = (groups / scales.clamp(min=1e-38)).round() * scales
    return torch.where((scales > 0) & scales.isfinite(), whole, 0.0).flatten(1)[:, :width]


def coded_rows(x: Tensor, coded: Coded) -> Tensor:
    """x [N, H], rounded, through the copy: fp32 [N, C]."""
    return torch.ops.pp_fx.coded_rows(x, *coded)


_library = torch.library.Library("pp_fx", "FRAGMENT")
_library.define("coded_rows(Tensor x, Tensor codes, Tensor scales) -> Tensor")


def _plain(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return F.linear(rounded(x), decode(Coded(codes, scales))[:, : x.shape[1]])


def _native(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    library: Any = native()
    if library is None or x.dtype not in TYPES:
        return _plain(x, codes, scales)
    x = x.contiguous()
    y = torch.empty(x.shape[0], codes.shape[0], dtype=torch.float32)
    library.pp_fx_coded_linear(
        TYPES[x.dtype],
        8 if codes.dtype == torch.int8 else 4,
        codes.data_ptr(),
        scales.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        *y.shape,
        x.shape[1],
        torch.get_num_threads(),
    )
    return y


_library.impl("coded_rows", _plain, "CompositeExplicitAutograd")
_library.impl("coded_rows", _native, "CPU")
_library.impl("coded_rows", lambda x, codes, _: x.new_empty(x.shape[0], codes.shape[0], dtype=torch.float32), "Meta")
