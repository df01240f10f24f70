"""Weights in oneDNN's own layout, for the products of decoding on a CPU: `pp_fx::pack`, `unpack`, `packed_linear`.

Decoding waits for memory, so what counts is how fast one pass over the weights goes. On a CPU oneDNN reads weights of
its own blocked layout up to twice as fast as rows, and packing them costs about three products, once for a generation;
Inductor's `freezing` does the same to weights that never change. Elsewhere the rows lie one after the other.

The packed weight is an opaque tensor: `torch.compile` passes it from call to call as any other, but only operators of
our own can make and read it.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def packs(weight: Tensor) -> bool:
    """Whether decode steps read this weight packed."""
    return weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES and not needs_torch(weight)


def packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    """x [.., in] through a packed weight [out, in]: [.., out]."""
    return torch.ops.pp_fx.packed_linear(x, packed)


def pack(weight: Tensor) -> Tensor:
    """A weight [out, in] in oneDNN's own layout, opaque."""
    return torch.ops.pp_fx.pack(weight)


def unpack(packed: Tensor) -> Tensor:
    """The weight [out, in] in rows."""
    return torch.ops.pp_fx.unpack(packed)


def needs_torch(tensor: Tensor) -> bool:
    """Whether gradients or autocast ask for torch's own product, with weights in rows."""
    return (torch.is_grad_enabled() and tensor.requires_grad) or torch.is_autocast_enabled("cpu")
