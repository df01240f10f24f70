"""Remember what ran."""

from __future__ import annotations

from ..runtime import history
from .base import BlockGraph, Pass, PassResult


class InsertHistory(Pass):
    """Update the running statistics from what ran, after the output projection."""

    requires = ("state", "rows", "probe_state", "kept", "branch_state", "output")
    ensures = ("history",)

    def call(self, block: BlockGraph) -> PassResult:
        for inserted in block.inserted:
            nodes = inserted.nodes
            with block.graph.inserting_after(nodes["output"]):
                nodes["history"] = block.call(
                    history.update_history,
                    (nodes["state"], nodes["branch_state"], nodes["kept"]),
                    inserted.name("history"),
                    real=block.real_rows,
                    probe=nodes["probe_state"],
                    rows=nodes["rows"],
                    gram=inserted.gram,
                    residual=inserted.group.residual,
                    weight=inserted.group.output.weight,
                    plan=block.plan,
                )
        return PassResult(len(block.inserted))
