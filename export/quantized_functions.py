"""Operators of domain `pp_fx` with quantized weights, and their bodies; see `functions`.

The bodies gather the rows that are needed and widen them (`com.microsoft::GatherBlockQuantized`); the native kernels
multiply with the codes.
"""

# mypy: disable-error-code="operator, type-var, arg-type, call-overload"
# the functions of onnxscript are another language: their operators build a graph

from __future__ import annotations

from typing import Any

from onnxscript import opset23, script
from onnxscript.values import Opset

from .functions import _PP_FX
from .quantized_weights import BLOCK

_MS = Opset("com.microsoft", 1)


def functions_of(bits: int) -> tuple[Any, ...]:
    """The operators' bodies for rows of so many bits: their names do not say how many."""

    @script(_PP_FX, default_opset=opset23)
    def QuantizedRows(X, codes, scales, kept):
        """X weight[kept]^T: X [..., H], codes and scales of a weight [N, H], kept int64 [k] -> [..., k]."""
        flat = opset23.Unsqueeze(scales, opset23.Constant(value_ints=[-1]))
        rows = _MS.GatherBlockQuantized(codes, kept, flat, gather_axis=0, quantize_axis=2, block_size=BLOCK, bits=bits)
        weight = opset23.Reshape(rows, opset23.Constant(value_ints=[0, -1]))
        return opset23.MatMul(X, opset23.Transpose(weight, perm=[1, 0]))

    @script(_PP_FX, default_opset=opset23)
    def QuantizedOutput(X, codes, scales):
        """X (codes * scales): X [..., C], codes int8 [C, O], scales [O] -> [..., O]."""
        return opset23.MatMul(X, opset23.Cast(codes, to=1)) * scales

    @script(_PP_FX, default_opset=opset23)
    def QuantizedStrongest(strength, factor, X, up, up_scales, up_bias, down, down_scales, count):
        """As `Strongest`: up as codes and scales, down int8 [C, O] with scales [O]. Token by token, its rows alone."""
        flat = opset23.Unsqueeze(up_scales, opset23.Constant(value_ints=[-1]))
        first = opset23.Constant(value_ints=[0])
        made = opset23.Cast(opset23.Slice(down, first, first, first), to=1)  # no rows yet
        for i in range(opset23.Squeeze(opset23.Shape(strength, start=0, end=1))):
            token = opset23.Reshape(i, opset23.Constant(value_ints=[1]))
            _, chosen = opset23.TopK(opset23.Gather(strength, i), count, axis=0, sorted=0)
            rows = _MS.GatherBlockQuantized(
                up, chosen, flat, gather_axis=0, quantize_axis=2, block_size=BLOCK, bits=bits
            )
            weight = opset23.Reshape(rows, opset23.Constant(value_ints=[0, -1]))
            x = opset23.Gather(X, token)
            z = opset23.MatMul(x, opset23.Transpose(weight, perm=[1, 0])) + opset23.Gather(up_bias, chosen)
            z = z * opset23.Gather(opset23.Gather(factor, i), chosen)
            numbers = opset23.Cast(opset23.Gather(down, chosen), to=1)
            made = opset23.Concat(made, opset23.MatMul(z, numbers), axis=0)
        return made * down_scales

    return QuantizedRows, QuantizedOutput, QuantizedStrongest, QuantizedStrongestOutput


@script(_PP_FX, default_opset=opset23)
def QuantizedStrongestOutput(strength, z, down, down_scales, count):
    """As `StrongestOutput`: down int8 [C, O] with scales [O]."""
    first = opset23.Constant(value_ints=[0])
    made = opset23.Cast(opset23.Slice(down, first, first, first), to=1)
    for i in range(opset23.Squeeze(opset23.Shape(strength, start=0, end=1))):
        _, chosen = opset23.TopK(opset23.Gather(strength, i), count, axis=0, sorted=0)
        row = opset23.Unsqueeze(opset23.Gather(opset23.Gather(z, i), chosen), first)
        numbers = opset23.Cast(opset23.Gather(down, chosen), to=1)
        made = opset23.Concat(made, opset23.MatMul(row, numbers), axis=0)
    return made * down_scales
