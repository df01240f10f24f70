"""Find what may be pruned."""

from __future__ import annotations

from ..groups.find import find_groups
from .base import BlockGraph, GroupNodes, Pass, PassResult


class FindChannelGroups(Pass):
    """Analysis: the coupled channels of the MLP and the separable heads of the attention."""

    def call(self, block: BlockGraph) -> PassResult:
        cut = block.cut
        block.groups = find_groups(block.graph, None if cut is None else dict.fromkeys(cut.summed, cut.size))
        block.inserted = [GroupNodes(g) for g in block.groups.found]
        return PassResult(len(block.inserted), tuple(block.groups.reasons))
