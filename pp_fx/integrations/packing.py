"""What a packed linear layer holds, whichever library packed it: numbers and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

AGAIN = "load the model again, and call pp_fx.to_torchao(model) before its first call"
"""The remedy where a first call has changed the weights."""


class Numbers(NamedTuple):
    """A weight [out, in] in numbers of a byte.

    Attributes:
        codes: int8 or float8 [out, in].
        scales: [out, in / group]; a number is (code - zero point) * scale.
        zero_points: int8 [out, in / group], or None for zeros.
        bits: of a number.
        rounds_inputs: whether the library rounds a call's tokens to 8 bits as well, each by its largest.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    rounds_inputs: bool


class Packing(NamedTuple):
    """How a library packs a linear layer.

    Attributes:
        refusal: why a layer's numbers cannot be taken, with the remedy; None where they can.
        numbers: those of a layer.
    """

    refusal: Callable[[Any], str | None]
    numbers: Callable[[Any], Numbers]
