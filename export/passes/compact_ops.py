"""Decoding's products with compact weights as operators of domain `pp_fx`, for which there are native kernels.

onnxruntime prepares constant weights for its kernels when it loads a file; weights that come with a call, as a
selection does, it reads at about half of the speed. The native kernels read them at the speed of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import ir

from ..functions import DOMAIN
from ..names import COMPACT, of_kind


class UseCompactOps(ir.passes.InPlacePass):
    """Rewrite `MatMul`s with weights `pp_compact.*` as `CompactLinear`, `CompactOutput` and `CompactSwiGLU`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """The products first, then what is made of two of them."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "MatMul" and _is_compact(_whole(node.inputs[1])):
                _replace(node, "CompactOutput", [node.inputs[0], node.inputs[1]])
                modified = True
            elif node.op_type == "MatMul" and (weight := _transposed(node.inputs[1])) is not None:
                _replace(node, "CompactLinear", [node.inputs[0], weight])
                modified = True
        for node in list(model.graph):
            if node.op_type == "Mul" and (inputs := _swiglu(node)) is not None:
                _replace(node, "CompactSwiGLU", inputs)
                modified = True
        return ir.passes.PassResult(model, modified)


def _swiglu(node: ir.Node) -> list[ir.Value] | None:
    """x, gate weight, up weight of `silu(x gate^T) * (x up^T)`; None for any other product."""
    for silu, up in (node.inputs, reversed(node.inputs)):
        made, product = _producer(silu), _producer(up)
        if made is None or made.op_type != "Mul" or product is None or product.op_type != "CompactLinear":
            continue
        for gate, sigmoid in (made.inputs, reversed(made.inputs)):
            linear, curve = _producer(gate), _producer(sigmoid)
            if linear is None or curve is None or linear.op_type != "CompactLinear" or curve.op_type != "Sigmoid":
                continue
            if curve.inputs[0] is gate and linear.inputs[0] is product.inputs[0]:
                return [linear.inputs[0], linear.inputs[1], product.inputs[1]]  # type: ignore[list-item]
    return None


def _transposed(value: ir.Value | None) -> ir.Value | None:
    """w of w^T, where w is a compact weight."""
    node = _producer(value)
    if node is None or node.op_type != "Transpose" or list(node.attributes["perm"].value) != [1, 0]:
        return None
    return node.inputs[0] if _is_compact(_whole(node.inputs[0])) else None


def _whole(value: ir.Value | None) -> ir.Value | None:
    """The weight that a reshape made two-dimensional: attention's have an axis for the heads."""
    node = _producer(value)
    return node.inputs[0] if node is not None and node.op_type == "Reshape" else value


def _is_compact(value: ir.Value | None) -> bool:
    return value is not None and of_kind(value.name, COMPACT)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _replace(node: ir.Node, op: str, inputs: Sequence[ir.Value | None]) -> None:
    new = ir.Node(DOMAIN, op, inputs, name=node.name)
    old, made = node.outputs[0], new.outputs[0]
    made.name, made.type, made.shape = old.name, old.type, old.shape
    node.graph.insert_after(node, new)  # type: ignore[union-attr]
    ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)  # type: ignore[union-attr]
