"""Decide: score and top-k."""

from __future__ import annotations

from ..runtime import head_gram, select
from .base import BlockGraph, Pass, PassResult


class InsertSelection(Pass):
    """Score of every unit from probe and history, then the kept units (or those that the KV cache carries)."""

    requires = ("state", "rows", "probe_residual", "probe_state")
    ensures = ("score", "kept")

    def call(self, block: BlockGraph) -> PassResult:
        for inserted in block.inserted:
            group, nodes = inserted.group, inserted.nodes
            with block.graph.inserting_after(nodes["probe_state"]):
                weight = group.output.weight
                args = (
                    nodes["state"],
                    nodes["probe_state"],
                    nodes["rows"],
                    nodes["probe_residual"],
                    weight,
                    block.plan,
                )
                found = (
                    block.call(head_gram.probe_gram, args, inserted.name("gram")) if group.kind == "attention" else None
                )
                inserted.gram = found
            with block.graph.inserting_after(found or nodes["probe_state"]):
                args = (nodes["state"], nodes["probe_state"], nodes["rows"], found, block.plan)
                nodes["score"] = block.call(select.unit_scores, args, inserted.name("score"))
            with block.graph.inserting_after(nodes["score"]):
                chosen = (nodes["state"], nodes["score"], block.plan, block.layer)
                nodes["kept"] = block.call(select.choose_units, chosen, inserted.name("kept"))
        return PassResult(len(block.inserted))
