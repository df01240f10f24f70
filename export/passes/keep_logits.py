"""Logits of the last tokens alone."""

from __future__ import annotations

from onnxscript import ir

from ..names import KEEP_LOGITS
from ..outside import Outside


class KeepLogits(ir.passes.InPlacePass):
    """Cut the LM head's input to its last rows: a prompt needs no others, and the head is a large part of its work."""

    def __init__(self, outside: Outside) -> None:
        self.kept = outside.optional[KEEP_LOGITS]
        self.names = outside.head_names()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put the cut before the product with the head's weight."""
        head = next((node for node in model.graph if self._is_head(node)), None)
        if head is None:
            return ir.passes.PassResult(model, False)
        steps = [
            ir.Node("", "Neg", [self.kept]),
            ir.Node("", "Constant", [], [ir.AttrInt64("value_int", 0)]),
            ir.Node("", "Constant", [], [ir.AttrInt64("value_int", -(2**62))]),
            ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", [1])]),
            ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", [2**62])]),
        ]
        negative, zero, first, axis, end = (s.outputs[0] for s in steps)
        steps.append(ir.Node("", "Equal", [self.kept, zero]))
        steps.append(ir.Node("", "Where", [steps[-1].outputs[0], first, negative]))
        steps.append(ir.Node("", "Reshape", [steps[-1].outputs[0], axis]))
        steps.append(ir.Node("", "Slice", [head.inputs[0], steps[-1].outputs[0], end, axis]))
        for index, step in enumerate(steps):
            step.outputs[0].name = f"kept_logits_{index}"
        model.graph.insert_before(head, steps)
        head.replace_input_with(0, steps[-1].outputs[0])
        return ir.passes.PassResult(model, True)

    def _is_head(self, node: ir.Node) -> bool:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        while weight is not None and (made := weight.producer()) is not None and made.op_type == "Transpose":
            weight = made.inputs[0]
        return weight is not None and str(weight.name).removesuffix(".T") in self.names
