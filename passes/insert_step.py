"""Let every token of a decode step choose for itself."""

from __future__ import annotations

from ..groups.gate import Gate, factor_graph, find_gate
from ..groups.group import MlpGroup
from ..groups.projections import Projection
from ..runtime import step
from .base import BlockGraph, GroupNodes, Pass, PassResult


class InsertStep(Pass):
    """The MLP of a decode step as one call beside the prompt's path: over each token's own strongest channels.

    Where the MLP has a gate, the gate projection runs whole and chooses, and the other two read what is chosen; else
    all input projections run whole, and the output projection reads what is chosen.
    """

    requires = ("state",)

    def call(self, block: BlockGraph) -> PassResult:
        matches = 0
        for inserted in block.inserted:
            if isinstance(inserted.group, MlpGroup):
                gate = find_gate(inserted.group)
                if gate is None:
                    self._ungated(block, inserted)
                else:
                    self._gated(block, inserted, inserted.group, gate)
                matches += 1
        return PassResult(matches)

    def _gated(self, block: BlockGraph, inserted: GroupNodes, group: MlpGroup, gate: Gate) -> None:
        inserted.factor_graph = factor_graph(block.graph, group, gate)
        inserted.gate = group.inputs[gate.gate]
        parts = [self._part(group.inputs[i]) for i in (gate.gate, gate.up)]
        first = next(n for n in block.graph.nodes if n in group.entries)
        with block.graph.inserting_before(first):
            args = (inserted.nodes["state"], block.plan, first.args[0], *parts, group.output.weight, group.output.bias)
            inserted.nodes["step"] = block.call(step.gated_step, args, inserted.name("step"), group.output.node)

    def _ungated(self, block: BlockGraph, inserted: GroupNodes) -> None:
        output = inserted.group.output
        with block.graph.inserting_before(output.node):
            args = (inserted.nodes["state"], block.plan, output.node.args[0], output.weight, output.bias)
            inserted.nodes["step_output"] = block.call(step.output_step, args, inserted.name("step"), output.node)

    @staticmethod
    def _part(part: Projection) -> tuple:
        return part.weight, part.bias, part.range
