from __future__ import annotations

from .. import history
from .base import BlockGraph, Pass, PassResult


class InsertHistory(Pass):
    """Update the running statistics from what ran, after the output projection."""

    requires = ("kept", "branch_state")

    def call(self, block: BlockGraph) -> PassResult:
        for inserted in block.inserted:
            nodes = inserted.nodes
            with block.graph.inserting_after(nodes["output"]):
                args = (
                    nodes["state"],
                    nodes["branch_state"],
                    nodes["kept"],
                    block.real_rows,
                    nodes["probe_state"],
                    nodes["rows"],
                    inserted.gram,
                    inserted.group.residual,
                    inserted.group.output.weight,
                    block.plan,
                )
                nodes["history"] = block.call(history.update_history, args, inserted.name("history"))
        return PassResult(len(block.inserted))
