"""Compact weights of decoding: the kept rows and columns, packed where this processor reads them faster so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.packed_linear import needs_torch, pack, packed_linear, packs, unpack
from ..layouts import is_plain, map_parts
from .buffers import keep, own


class CompactLinear(NamedTuple):
    """A linear layer over kept units: weight [out, in], opaque where it is `packed`, and bias [out]."""

    weight: Tensor
    bias: Tensor | None
    packed: bool = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Rows go into a pickle: another machine packs them in its own way."""
        return make_compact, (rows_of(self), self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompactLinear:
        """Packed weights are shared: nothing writes to them."""
        weight = self.weight if self.packed else copy.deepcopy(self.weight, memo)
        return CompactLinear(weight, copy.deepcopy(self.bias, memo), self.packed)


def make_compact(
    weight: Tensor, bias: Tensor | None, old: CompactLinear | None = None, changed: Tensor | None = None
) -> CompactLinear:
    """A linear layer [out, in] as decode steps read it: packed where this processor can, as it lies elsewhere.

    Args:
        old: what was stored before. What lies unpacked is written in place (`buffers`); `weight` may be its own.
        changed: bool scalar; where it is false, `old` stays.
    """
    kept_bias = None if bias is None else keep(old.bias if old else None, bias, changed)
    if not is_plain(weight):
        return CompactLinear(_kept_parts(weight, old.weight if old else None, changed), kept_bias)
    if packs(weight):
        weight = weight if changed is None or old is None else torch.where(changed, weight, rows_of(old))
        return CompactLinear(pack(weight), kept_bias, True)
    former = old.weight if old and not old.packed else None
    return CompactLinear(weight if former is weight else keep(former, weight, changed), kept_bias)


def _kept_parts(weight: Tensor, old: Tensor | None, changed: Tensor | None) -> Tensor:
    """A quantized weight, part by part in the memory of the old one; a compiled call makes new memory."""
    if old is None or type(old) is not type(weight):
        return map_parts(own, weight)
    if not torch.compiler.is_compiling():
        return map_parts(lambda new, held: keep(held, new, changed), weight, old)
    if changed is not None:
        weight = map_parts(lambda new, held: torch.where(changed, new, held), weight, old)
    return map_parts(own, weight)


def rows_of(linear: CompactLinear) -> Tensor:
    """The weight [out, in] in rows."""
    return unpack(linear.weight) if linear.packed else linear.weight


def compact_linear(x: Tensor, linear: CompactLinear) -> Tensor:
    """x [B, T, in] through a compact weight [out, in]: [B, T, out] in x's dtype."""
    packed = linear.packed and not needs_torch(x)
    out = packed_linear(x, linear.weight) if packed else F.linear(x, rows_of(linear))
    return out if linear.bias is None else out + linear.bias  # for few rows cheaper than a bias inside the product
