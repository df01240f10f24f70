"""Let something stand in for what is dropped."""

from __future__ import annotations

from ..runtime import compensate
from .base import BlockGraph, Pass, PassResult


class InsertCompensation(Pass):
    """What stands in for the dropped units joins the output projection."""

    requires = ("state", "rows", "probe_state", "kept", "output")
    ensures = ("compensation",)

    def call(self, block: BlockGraph) -> PassResult:
        for inserted in block.inserted:
            nodes, output = inserted.nodes, inserted.nodes["output"]
            with block.graph.inserting_before(output):
                vector = block.call(
                    compensate.compensate,
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
            output.kwargs = {**output.kwargs, "compensation": vector}
            nodes["compensation"] = vector
        return PassResult(len(block.inserted))
