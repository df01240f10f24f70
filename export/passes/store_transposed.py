"""Weights that are transposed lie so in the file."""

from __future__ import annotations

from onnxscript import ir

from ..names import TRACED, of_kind
from ..outside import Outside


class StoreTransposed(ir.passes.InPlacePass):
    """A layer's weight that a node transposes becomes an input that lies transposed in the file."""

    def __init__(self, outside: Outside) -> None:
        self.moved = outside.moved

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the nodes by inputs whose name ends in `.T`."""
        made: dict[str, ir.Value] = {str(v.name): v for v in model.graph.inputs}
        modified = False
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            source = node.inputs[0] if self._turns(node) else None
            if source is None:
                continue
            name = str(source.name)
            name = name.removesuffix(".T") if name.endswith(".T") else f"{name}.T"  # turned twice: Conv1D (GPT-2)
            if name not in made:
                made[name] = ir.Value(name=name, type=source.type, shape=node.outputs[0].shape)
                model.graph.inputs.append(made[name])
            ir.convenience.replace_all_uses_with(node.outputs[0], made[name])
            node.graph.remove(node, safe=True)  # type: ignore[union-attr]
            modified = True
        return ir.passes.PassResult(model, modified)

    def _turns(self, node: ir.Node) -> bool:
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not of_kind(source.name, TRACED) or source.producer() is not None:
            return False
        return list(node.attributes["perm"].as_ints()) == [1, 0] and not self.moved(str(source.name))
