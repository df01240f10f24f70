"""Operators of domain `pp_fx`: how a trace calls them, and their bodies in standard ONNX ops.

A runtime without our native library runs the body; one with it prefers the registered kernel.
"""

# mypy: disable-error-code="operator, type-var, arg-type, call-overload"
# the functions of onnxscript are another language: their operators build a graph

from __future__ import annotations

from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import ir, opset23, script
from onnxscript.values import Op, Opset

from ..kernels.solve import SOLVE
from .boundary import BOUNDARY

DOMAIN = "pp_fx"
VERSION = 1
_PP_FX = Opset(DOMAIN, VERSION)


@script(_PP_FX, default_opset=opset23)
def CompactLinear(X, weight):
    """X weight^T: X [..., H], weight [k, H] -> [..., k]."""
    return opset23.MatMul(X, opset23.Transpose(weight, perm=[1, 0]))


@script(_PP_FX, default_opset=opset23)
def CompactSwiGLU(X, gate, up):
    """silu(X gate^T) * (X up^T): X [..., H], gate and up [k, H] -> [..., k]."""
    gated = opset23.MatMul(X, opset23.Transpose(gate, perm=[1, 0]))
    return gated * opset23.Sigmoid(gated) * opset23.MatMul(X, opset23.Transpose(up, perm=[1, 0]))


@script(_PP_FX, default_opset=opset23)
def CompactOutput(X, weight):
    """X weight: X [..., k], weight [k, H] -> [..., H]."""
    return opset23.MatMul(X, weight)


@script(_PP_FX, default_opset=opset23)
def Strongest(strength, factor, X, up, up_bias, down, count):
    """sum over a token's chosen channels c of factor_c * (X up_c + up_bias_c) * down_c: its `count` strongest.

    strength fp32 and factor [N, C], X [N, H], up [C, H], up_bias [C], down [C, O], count int64 [1] -> [N, O].
    """
    z = factor * (opset23.MatMul(X, opset23.Transpose(up, perm=[1, 0])) + up_bias)
    largest, _ = opset23.TopK(strength, count, axis=-1)
    chosen = strength >= opset23.ReduceMin(largest, opset23.Constant(value_ints=[-1]), keepdims=1)
    return opset23.MatMul(opset23.Where(chosen, z, opset23.CastLike(opset23.Constant(value_float=0.0), z)), down)


@script(_PP_FX, default_opset=opset23)
def StrongestOutput(strength, z, down, count):
    """As `Strongest` where the output projection's input z [N, C] is known: [N, O]."""
    largest, _ = opset23.TopK(strength, count, axis=-1)
    chosen = strength >= opset23.ReduceMin(largest, opset23.Constant(value_ints=[-1]), keepdims=1)
    return opset23.MatMul(opset23.Where(chosen, z, opset23.CastLike(opset23.Constant(value_float=0.0), z)), down)


@script(_PP_FX, default_opset=opset23)
def Solve(A, B):
    """A^-1 B, A symmetric positive definite with eigenvalues of at least 1: Gauss-Jordan elimination by blocks.

    A block's inverse comes from Newton-Schulz steps X + X (I - S X), which double its correct digits; X = I / |S| is
    near enough to start from.
    """
    block = opset23.Constant(value_ints=[32])
    zero = opset23.Constant(value_ints=[0])
    one = opset23.Constant(value_ints=[1])
    n = opset23.Shape(A, start=0, end=1)
    padding = opset23.Mod(block - opset23.Mod(n, block), block)
    size = n + padding
    eye = opset23.EyeLike(opset23.ConstantOfShape(opset23.Concat(size, size, axis=0)), dtype=1)
    tail = opset23.Slice(eye, n, size, one)
    wide = opset23.Pad(A, opset23.Concat(zero, zero, padding, zero, axis=0))
    wide = opset23.Pad(wide, opset23.Concat(zero, zero, zero, padding, axis=0)) + opset23.Pad(
        tail, opset23.Concat(zero, n, zero, zero, axis=0)
    )
    work = opset23.Concat(wide, opset23.Pad(B, opset23.Concat(zero, zero, padding, zero, axis=0)), axis=1)
    small = opset23.Slice(opset23.Slice(eye, zero, block, zero), zero, block, one)
    for i in range(opset23.Squeeze(size / block)):
        start = opset23.Reshape(i, one) * block
        stop = start + block
        rows = opset23.Slice(work, start, stop, zero)
        pivot = opset23.Slice(rows, start, stop, one)
        # with a diagonal of ones the block is well conditioned, and few steps do
        scale = opset23.Reciprocal(opset23.Sqrt(opset23.ReduceSum(pivot * small, one, keepdims=1)))
        pivot = pivot * scale * opset23.Transpose(scale, perm=[1, 0])
        norm = opset23.ReduceMax(opset23.ReduceSum(opset23.Abs(pivot), one, keepdims=0), keepdims=0)
        inverse = small / norm
        wrong = small - pivot / norm
        steps = opset23.Constant(value_int=60)
        for _ in range(steps):
            inverse = inverse + opset23.MatMul(inverse, wrong)
            wrong = small - opset23.MatMul(pivot, inverse)
            finished = opset23.ReduceMax(opset23.Abs(wrong), keepdims=0) < 0.001
            if finished:
                break
        inverse = inverse + opset23.MatMul(inverse, wrong)
        inverse = inverse + opset23.MatMul(inverse, small - opset23.MatMul(pivot, inverse))
        solved = opset23.MatMul(inverse * scale * opset23.Transpose(scale, perm=[1, 0]), rows)
        rest = work - opset23.MatMul(opset23.Slice(work, start, stop, one), solved)
        work = opset23.Concat(
            opset23.Slice(rest, zero, start, zero), solved, opset23.Slice(rest, stop, size, zero), axis=0
        )
    columns_of_b = opset23.Shape(B, start=1, end=2)
    right = opset23.Slice(work, size, size + columns_of_b, one)
    return opset23.Slice(right, zero, n, zero)


def _schema(name: str, inputs: dict[str, str], constraints: list[tuple[str, list[str], str]]) -> OpSchema:
    parameters = [OpSchema.FormalParameter(key, kind) for key, kind in inputs.items()]
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=parameters,
        outputs=[OpSchema.FormalParameter("Y", "T")],
        type_constraints=constraints,
    )


_BOUNDARY = Op(
    _PP_FX,
    "Boundary",
    OpSchema(
        "Boundary",
        DOMAIN,
        VERSION,
        inputs=[OpSchema.FormalParameter("X", "T")],
        outputs=[OpSchema.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[
            OpSchema.Attribute("position", OpSchema.AttrType.INT, "", required=True),
            OpSchema.Attribute("enters", OpSchema.AttrType.INT, "", required=True),
        ],
    ),
)
_SOLVE = Op(_PP_FX, "Solve", _schema("Solve", {"A": "T", "B": "T"}, [("T", ["tensor(float)"], "")]))


_TYPES = [
    ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
    ("F", ["tensor(float)"], ""),
    ("I", ["tensor(int64)"], ""),
]
_GATED = {"strength": "F", "factor": "T", "X": "T", "up": "T", "up_bias": "T", "down": "T", "count": "I"}
_STRONGEST = Op(_PP_FX, "Strongest", _schema("Strongest", _GATED, _TYPES))
_UNGATED = {"strength": "F", "z": "T", "down": "T", "count": "I"}
_STRONGEST_OUTPUT = Op(_PP_FX, "StrongestOutput", _schema("StrongestOutput", _UNGATED, _TYPES))


def _strongest(strength: Any, factor: Any, x: Any, up: Any, up_bias: Any, down: Any, down_bias: Any, count: int) -> Any:
    asked = opset23.Constant(value_ints=[count])
    if up is None:
        made = _STRONGEST_OUTPUT(strength, factor, down, asked)
    else:
        if up_bias is None:
            channels = opset23.Shape(up, start=0, end=1)
            up_bias = opset23.Expand(opset23.CastLike(opset23.Constant(value_floats=[0.0]), up), channels)
        made = _STRONGEST(strength, factor, x, up, up_bias, down, asked)
    return made if down_bias is None else made + down_bias


def _solve(a: Any, b: Any) -> Any:
    return _SOLVE(a, b)


def _boundary(x: Any, position: int, enters: bool) -> Any:
    return _BOUNDARY(x, position=position, enters=int(enters))


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """As torch.onnx's own; fewer key/value heads need no `enable_gqa` (Falcon broadcasts its one)."""
    return opset23.Attention(query, key, value, attn_mask, scale=scale, is_causal=int(is_causal))[0]


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    SOLVE: _solve,
    BOUNDARY: _boundary,
    torch.ops.pp_fx.strongest.default: _strongest,
}
"""torch operator -> call of the ONNX operator."""


FUNCTIONS = (Solve, CompactLinear, CompactSwiGLU, CompactOutput, Strongest, StrongestOutput)
"""Operators that may be left in a file; `Boundary` is gone by then."""


def add_functions(model: ir.Model, functions: tuple[Any, ...] = FUNCTIONS) -> None:
    """Give the model the bodies of the `pp_fx` operators that it calls.

    They are attached to the finished model: the exporter's own passes would inline them.
    """
    called = {node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == DOMAIN}
    for key in [k for k in model.functions if k[0] == DOMAIN and k[1] not in called]:
        del model.functions[key]
    for function in functions:
        if function.name in called:
            body = ir.serde.deserialize_function(function.to_function_proto())
            for node in ir.traversal.RecursiveGraphIterator(body.graph):  # onnxscript misses what loops call
                body.opset_imports.setdefault(node.domain, VERSION)
            model.functions[body.identifier()] = body
    if called:
        model.opset_imports[DOMAIN] = VERSION
