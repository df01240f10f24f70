"""Compact weights of decoding: how they lie in memory, and the products with them.

Decoding waits for memory, so what counts is how fast one pass over the weights goes. On a CPU oneDNN reads weights of
its own blocked layout up to twice as fast as rows, and packing them costs about three products, once for a generation;
Inductor's `freezing` does the same to weights that never change. Elsewhere the rows lie one after the other.

The packed weight is an opaque tensor: `torch.compile` passes it from call to call as any other, but only operators of
our own can make and read it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .buffers import keep

_library = torch.library.Library("pp_fx", "FRAGMENT")
_library.define("pack(Tensor weight) -> Tensor")
_library.define("unpack(Tensor packed) -> Tensor")
_library.define("packed_linear(Tensor x, Tensor packed) -> Tensor")


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")


def _opaque(weight: Tensor) -> Tensor:
    return weight.new_empty_strided(weight.shape, (1, 0))  # the strides that opaque tensors give when they are asked


for _name, _kernel, _shape in (
    ("pack", _pack, _opaque),
    ("unpack", lambda packed: packed.to_dense(), lambda packed: packed.new_empty(packed.shape, layout=torch.strided)),
    ("packed_linear", _packed_linear, lambda x, packed: x.new_empty((*x.shape[:-1], packed.shape[0]))),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _shape, "Meta")


def _packed_dtypes() -> frozenset[torch.dtype]:
    """What oneDNN multiplies on this processor by itself."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return frozenset()
    halves = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset({torch.float32, *(dtype for dtype, supported in halves.items() if supported)})


PACKED_DTYPES = _packed_dtypes()


class CompactLinear(NamedTuple):
    """A linear layer over kept units: weight [out, in], opaque where it is `packed`, and bias [out]."""

    weight: Tensor
    bias: Tensor | None
    packed: bool = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple]:
        """Rows go into a pickle: another machine packs them in its own way."""
        return store, (rows_of(self), self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompactLinear:
        """Packed weights are shared: nothing writes to them."""
        weight = self.weight if self.packed else copy.deepcopy(self.weight, memo)
        return CompactLinear(weight, copy.deepcopy(self.bias, memo), self.packed)


def packs(weight: Tensor) -> bool:
    """Whether decode steps read this weight packed."""
    return weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES and not _plain(weight)


def store(
    weight: Tensor, bias: Tensor | None, old: CompactLinear | None = None, changed: Tensor | None = None
) -> CompactLinear:
    """A linear layer [out, in] as decode steps read it: packed where this processor can, as it lies elsewhere.

    Args:
        old: what was stored before. What lies unpacked is written in place (`pp_fx.buffers`); `weight` may be its own.
        changed: bool scalar; where it is false, `old` stays.
    """
    kept_bias = None if bias is None else keep(old.bias if old else None, bias, changed)
    if packs(weight):
        weight = weight if changed is None or old is None else torch.where(changed, weight, rows_of(old))
        return CompactLinear(torch.ops.pp_fx.pack(weight), kept_bias, True)
    former = old.weight if old and not old.packed else None
    return CompactLinear(weight if former is weight else keep(former, weight, changed), kept_bias)


def rows_of(linear: CompactLinear) -> Tensor:
    """The weight [out, in] in rows."""
    return torch.ops.pp_fx.unpack(linear.weight) if linear.packed else linear.weight


def compact_linear(x: Tensor, linear: CompactLinear) -> Tensor:
    """x [B, T, in] through a compact weight [out, in]: [B, T, out] in x's dtype."""
    if linear.packed and not _plain(x):
        out = torch.ops.pp_fx.packed_linear(x, linear.weight)
    else:
        out = F.linear(x, rows_of(linear))
    return out if linear.bias is None else out + linear.bias  # for few rows cheaper than a bias inside the product


def _plain(tensor: Tensor) -> bool:
    """Whether gradients or autocast ask for torch's own product."""
    return (torch.is_grad_enabled() and tensor.requires_grad) or torch.is_autocast_enabled("cpu")
