"""Kept columns of a weight that lies in rows: `pp_fx::kept_columns`.

A CPU's native kernel reads every row once, in order, and packs what is kept by a mask (AVX-512; elsewhere one number
at a time). torch's own gathers take four to ten times as long (docs/research/speed.md, section 6).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .native_kernels import native

_SIZES = (1, 2, 4)
"""Bytes of the numbers that the native kernel moves."""


def kept_columns(weight: Tensor, kept: Tensor) -> Tensor:
    """weight[:, kept], without gradients.

    Args:
        weight: [H, C], of any dtype.
        kept: int64 [k], in [0, C); fastest where it ascends.

    Returns:
        [H, k], contiguous.
    """
    return torch.ops.pp_fx.kept_columns(weight, kept)


def copy_columns(weight: Tensor, kept: Tensor, out: Tensor) -> Tensor:
    """As `kept_columns`, on a CPU, into `out` [H, k], contiguous, of the weight's dtype."""
    size = weight.element_size()
    library: Any = native() if size in _SIZES and weight.stride(1) == 1 else None
    if library is None:
        return torch.index_select(weight, 1, kept, out=out)
    kept = kept.contiguous()
    library.pp_fx_columns(
        size,
        weight.data_ptr(),
        weight.stride(0),
        kept.data_ptr(),
        kept.shape[0],
        out.data_ptr(),
        *weight.shape,
        torch.get_num_threads(),
    )
    return out


def _plain(weight: Tensor, kept: Tensor) -> Tensor:
    return weight.index_select(1, kept)


def _native(weight: Tensor, kept: Tensor) -> Tensor:
    return copy_columns(weight, kept, _shape(weight, kept))


def _shape(weight: Tensor, kept: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0], kept.shape[0])


_library = torch.library.Library("pp_fx", "FRAGMENT")
_library.define("kept_columns(Tensor weight, Tensor kept) -> Tensor")
_library.impl("kept_columns", _plain, "CompositeExplicitAutograd")
_library.impl("kept_columns", _native, "CPU")
_library.impl("kept_columns", _shape, "Meta")
