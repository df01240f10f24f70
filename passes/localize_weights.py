"""Tensor parallel: a graph reads what this process holds of a parameter."""

from __future__ import annotations

from ..shards import local
from .base import BlockGraph, Pass, PassResult


class LocalizeWeights(Pass):
    """Every parameter that is a DTensor is read through `shards.local`; behind all passes that look for parameters."""

    def call(self, block: BlockGraph) -> PassResult:
        cut = frozenset() if block.cut is None else block.cut.parameters
        found = [n for n in block.graph.nodes if n.op == "get_attr" and str(n.target) in cut]
        for node in found:
            users = list(node.users)
            with block.graph.inserting_after(node):
                here = block.call(local, (node,), f"{node.name}_local", node)
            for user in users:
                user.replace_input_with(node, here)
        return PassResult(len(found))
