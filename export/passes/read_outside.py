"""A phase reads inputs and constants that lie outside of it."""

from __future__ import annotations

from onnxscript import ir

from ..names import position_of
from ..outside import Outside


class ReadOutside(ir.passes.InPlacePass):
    """What belongs to no layer is read from outside: the file's inputs, and initializers that both phases share."""

    def __init__(self, outside: Outside) -> None:
        self.outside = outside

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the uses."""
        for value in model.graph.inputs:
            if position_of(value.name) is None:
                ir.convenience.replace_all_uses_with(value, self.outside.inputs[str(value.name)])
        for value in model.graph.initializers.values():
            ir.convenience.replace_all_uses_with(value, self.outside.constant(value))
        return ir.passes.PassResult(model, True)
