"""A scale for each group of input features: torchao's `IntxUnpackedToInt8Tensor` (1 to 8 bits, a byte for each number).

A row goes with the scales of its groups. Columns share theirs with columns that are dropped, so kept ones are widened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import LAYOUTS, Codes, Layout, rebuilt


class ScaledGroups(Layout):
    """Numbers `qdata` [out, in], `scale` and `zero_point` [out, in / group]."""

    def refusal(self, weight: Any) -> str | None:
        if weight.scale.ndim != 2 or weight.scale.shape[0] != weight.shape[0]:
            return (
                f"has scales {list(weight.scale.shape)} for {weight.shape[0]} rows, and a row can only go with scales "
                "of its own; quantize with granularity=PerGroup(..) or PerAxis(0)"
            )
        return None

    def rows(self, weight: Any, index: Tensor | slice) -> Tensor:
        parts = {name: getattr(weight, name) for name in ("qdata", "scale", "zero_point")}
        parts = {n: p[index] if isinstance(index, slice) else p.index_select(0, index) for n, p in parts.items()}
        made: Tensor = rebuilt(weight, **parts)
        return made

    def columns(self, weight: Any, index: Tensor) -> Tensor:
        numbers = weight.qdata.index_select(1, index)
        group = index * weight.scale.shape[1] // weight.shape[1]
        scale, zero = (part.index_select(1, group) for part in (weight.scale, weight.zero_point))
        widened: Tensor = (numbers.to(weight.dtype) - zero.to(weight.dtype)) * scale.to(weight.dtype)
        return widened

    def codes(self, weight: Any) -> Codes | None:
        if weight.zero_point.dtype != torch.int8:
            return None
        return Codes(weight.qdata, weight.scale.to(weight.dtype), weight.zero_point)


LAYOUTS["torchao.IntxUnpackedToInt8Tensor"] = ScaledGroups()
