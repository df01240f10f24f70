"""One scale for each output row: torchao's `Int8Tensor` (with or without dynamic activations) and `Float8Tensor`.

A row goes with its scale. A column is numbers alone, since its scales are those of the whole weight; so scales of
activations that are rounded as well are those of the kept columns, as they arrive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import LAYOUTS, Codes, Layout, rebuilt


class ScaledRows(Layout):
    """Numbers `qdata` [out, in], `scale` [out, 1], perhaps `zero_point` [out, 1] and `act_pre_scale` [in]."""

    def refusal(self, weight: Any) -> str | None:
        if weight.scale.numel() != weight.shape[0]:
            return (
                f"has {weight.scale.numel()} scales for {weight.shape[0]} rows, and a row can only go with a scale of "
                "its own; quantize with granularity=PerRow()"
            )
        zero = getattr(weight, "zero_point", None)
        if zero is not None and bool(zero.any()):
            return "has zero points, which torchao's products leave out; quantize symmetrically"
        if any(getattr(weight, name, None) is not None for name in ("act_quant_scale", "act_quant_zero_point")):
            return (
                "rounds its input by a scale that was set for all columns; quantize with dynamic activations, or the "
                "weights only"
            )
        return None

    def rows(self, weight: Any, index: Tensor | slice) -> Tensor:
        names = [name for name in ("qdata", "scale", "zero_point") if getattr(weight, name, None) is not None]
        parts = {name: _taken(getattr(weight, name), index) for name in names}
        made: Tensor = rebuilt(weight, **parts)
        return made

    def columns(self, weight: Any, index: Tensor) -> Tensor:
        parts: dict[str, Any] = {"qdata": _taken(weight.qdata.t(), index).t(), "block_size": [1, index.shape[0]]}
        scale = getattr(weight, "act_pre_scale", None)
        if scale is not None and scale.numel() > 1:
            parts["act_pre_scale"] = scale.index_select(-1, index)
        made: Tensor = rebuilt(weight, **parts)
        return made

    def by_columns(self, weight: Any) -> Tensor:
        made: Tensor = rebuilt(weight, qdata=weight.qdata.t().contiguous().t())
        return made

    def unrounded(self, weight: Any) -> Tensor:
        if getattr(weight, "act_quant_kwargs", None) is None:
            found: Tensor = weight
            return found
        made: Tensor = rebuilt(weight, act_quant_kwargs=None)
        return made

    def codes(self, weight: Any) -> Codes | None:
        if weight.qdata.dtype != torch.int8 or weight.act_pre_scale is not None:
            return None
        return Codes(weight.qdata, weight.scale.flatten().float())


def _taken(numbers: Tensor, index: Tensor | slice) -> Tensor:
    """Rows of a part; no kernel takes float8, so its numbers go as bytes."""
    if isinstance(index, slice):
        return numbers[index]
    if numbers.itemsize > 1 or numbers.dtype == torch.int8:
        return numbers.index_select(0, index)
    return numbers.view(torch.uint8).index_select(0, index).view(numbers.dtype)


LAYOUTS["torchao.Int8Tensor"] = LAYOUTS["torchao.Float8Tensor"] = ScaledRows()
