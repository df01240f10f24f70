from __future__ import annotations

from .. import selection
from .base import BlockGraph, Pass, PassResult


class InsertCompensation(Pass):
    """What stands in for the dropped units joins the output projection."""

    requires = ("kept", "output")

    def call(self, block: BlockGraph) -> PassResult:
        for inserted in block.inserted:
            nodes, output = inserted.nodes, inserted.nodes["output"]
            with block.graph.inserting_before(output):
                vector = block.call(
                    selection.compensate,
                    (
                        nodes["state"],
                        nodes["kept"],
                        nodes["probe_state"],
                        nodes["rows"],
                        output.args[2],
                        block.plan,
                    ),
                    inserted.name("compensation"),
                )
            output.args = (*output.args[:-1], vector)
        return PassResult(len(block.inserted))
