"""What a layout is, which weight has which, and what the rest of the library asks of a weight.

A quantized weight is a tensor subclass that hides its parts (torchao's tensors). What is taken of one is a weight of
the same class where that can be, so that the library that quantized it multiplies with the kept part in the same way
as with the whole: `torch.nn.functional.linear` stays the only product. Ordinary tensors have no layout.

What takes or reads parts goes into a compiled graph as it is (`torch._dynamo.allow_in_graph`), and AOTAutograd traces
through it: graphs hold the parts alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_CHUNK = 1024
"""Rows that are widened at a time."""
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Codes(NamedTuple):
    """A weight as native kernels read it.

    Attributes:
        numbers: int8 [out, in].
        scales: fp32 [out], for each row; with zeros [out, groups], for each of its groups of input features.
        zeros: int8 [out, groups], what is taken off the numbers of a group; None with scales for rows.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def transposed(self) -> Codes:
        """A copy whose rows are the input features: numbers [in, out], scales [out] or [groups, out], as the zeros."""
        numbers = self.numbers.t().contiguous()
        if self.zeros is None:
            return Codes(numbers, self.scales)
        return Codes(numbers, self.scales.t().contiguous(), self.zeros.t().contiguous())


class Layout(ABC):
    """How a kind of quantized weight [out, in] holds its numbers."""

    @abstractmethod
    def refusal(self, weight: Any) -> str | None:
        """Why rows and columns of this one cannot be taken, with the remedy; None where they can."""

    @abstractmethod
    def rows(self, weight: Any, index: Tensor | slice) -> Tensor:
        """weight[index], of the weight's class; of a slice, views."""

    @abstractmethod
    def columns(self, weight: Any, index: Tensor) -> Tensor:
        """weight[:, index]: of the weight's class, or an ordinary tensor where columns share their scales."""

    def by_columns(self, weight: Any) -> Tensor:
        """The same weight, its columns contiguous in memory where they can be taken as they lie."""
        found: Tensor = weight
        return found

    def unrounded(self, weight: Any) -> Tensor:
        """The same weight, multiplied with activations as they are."""
        found: Tensor = weight
        return found

    def codes(self, weight: Any) -> Codes | None:
        """What native kernels read, or None where there are none for this weight."""
        return None


LAYOUTS: dict[str, Layout] = {}
"""By the package and the name of the weight's class."""


def layout_of(weight: Any) -> Layout | None:
    """The layout of a quantized weight; None of an ordinary tensor, and of what no layout is known for."""
    cls = type(weight)
    return LAYOUTS.get(f"{cls.__module__.partition('.')[0]}.{cls.__name__}")


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary tensor."""
    return type(weight) in (Tensor, nn.Parameter) or layout_of(weight) is None


def _of(weight: Any) -> Layout:
    found = layout_of(weight)
    assert found is not None
    return found


def _in_graph(function: _Function) -> _Function:
    marked: _Function = torch._dynamo.allow_in_graph(function)
    return marked


@_in_graph
def take_rows(weight: Tensor, index: Tensor) -> Tensor:
    """Rows of a quantized weight [out, in], index int64 [k]: [k, in], of its class."""
    return _of(weight).rows(weight, index)


@_in_graph
def _range(weight: Tensor, *rows: int) -> Tensor:
    return _of(weight).rows(weight, slice(*rows))


def row_range(weight: Tensor, rows: tuple[int, int, int]) -> Tensor:
    """weight[start:stop:step] of a weight [out, in], plain or quantized, of its class: a view.

    torchao's tensors cannot be sliced under `torch.inference_mode`, so their parts are.
    """
    return weight[slice(*rows)] if is_plain(weight) else _range(weight, *rows)


@_in_graph
def take_columns(weight: Tensor, index: Tensor) -> Tensor:
    """Columns of a quantized weight [out, in], index int64 [k]: [out, k], of its class or an ordinary tensor."""
    return _of(weight).columns(weight, index)


@_in_graph
def _unrounded(weight: Tensor) -> Tensor:
    return _of(weight).unrounded(weight)


def unrounded(weight: Tensor) -> Tensor:
    """A weight [out, in] whose product leaves the activations as they are."""
    return weight if is_plain(weight) else _unrounded(weight)


def by_columns(weight: Tensor) -> Tensor:
    """A weight [out, in] of which columns are to be taken, transposed in memory."""
    return weight.t().contiguous().t() if is_plain(weight) else _of(weight).by_columns(weight)


@_in_graph
def _read_codes(weight: Tensor) -> Codes | None:
    return _of(weight).codes(weight)


def codes_of(weight: Tensor) -> Codes | None:
    """A quantized weight as native kernels read it; None where they cannot, and of an ordinary tensor."""
    return None if is_plain(weight) else _read_codes(weight)


@_in_graph
def _dequantized(weight: Tensor) -> Tensor:
    made: Tensor = weight.dequantize()
    return made


def widened(weight: Tensor) -> Tensor:
    """A weight as an ordinary tensor of its dtype."""
    return weight if is_plain(weight) else _dequantized(weight)


def map_parts(function: Callable[..., Tensor], weight: Any, *others: Any) -> Tensor:
    """A weight of the same class, made of what `function` makes of each of its parts and those of others like it."""
    if is_plain(weight):
        return function(weight, *others)
    made = [function(*parts) for parts in zip(*(_parts(one) for one in (weight, *others)), strict=True)]
    return _with_parts(weight, *made)


@_in_graph
def _parts(weight: Any) -> tuple[Tensor, ...]:
    return tuple(getattr(weight, name) for name in weight.__tensor_flatten__()[0])


@_in_graph
def _with_parts(weight: Any, *parts: Tensor) -> Tensor:
    made: Tensor = rebuilt(weight, **dict(zip(weight.__tensor_flatten__()[0], parts, strict=True)))
    return made


def stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor, of a quantized one those of its parts."""
    if is_plain(tensor):
        return int(tensor.numel() * tensor.element_size())
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def refusal(tensor: Any) -> str | None:
    """Why rows and columns of a parameter of a decoder layer cannot be taken; None where they can."""
    if tensor.ndim == 2 and tensor.dtype in (torch.int8, torch.uint8, torch.int32):
        return f"is packed into {tensor.dtype}, {_WORKS}"
    layout = layout_of(tensor)
    if layout is not None:
        return layout.refusal(tensor)
    if type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor):
        return None
    return f"is a {type(tensor).__name__}, {_WORKS}"


_WORKS = (
    "of which no rows can be taken; quantize with torchao by row (Int8WeightOnlyConfig, Float8WeightOnlyConfig) or in "
    "groups (IntxWeightOnlyConfig), convert GPTQ, AWQ and bitsandbytes' 8 bits (pp_fx.to_torchao), or load the model "
    "unquantized, on one device"
)


def rebuilt(weight: Any, **changes: Any) -> Any:
    """A torchao tensor like `weight` with other parts (`torchao.utils.TorchAOBaseTensor` names them)."""
    cls = type(weight)
    kinds = [f"{optional}tensor_{what}_names" for what in ("data", "attribute") for optional in ("", "optional_")]
    names = [name for kind in kinds for name in getattr(cls, kind, ())]
    return cls(**{**{name: getattr(weight, name) for name in names}, **changes})
