"""Remove what no longer has a use."""

from __future__ import annotations

from .base import BlockGraph, Pass, PassResult


class Cleanup(Pass):
    """Remove what no longer has a use; calls with side effects stay."""

    def call(self, block: BlockGraph) -> PassResult:
        before = len(block.graph.nodes)
        block.drop_unused()
        return PassResult(before - len(block.graph.nodes))
