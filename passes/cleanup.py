from __future__ import annotations

from .. import history, runtime
from .base import BlockGraph, Pass, PassResult

_EFFECTS = {runtime.kv_update, history.update_history}


class Cleanup(Pass):
    """Remove what no longer has a use; calls with side effects stay."""

    def call(self, block: BlockGraph) -> PassResult:
        before = len(block.graph.nodes)
        block.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or n.target in _EFFECTS)
        return PassResult(before - len(block.graph.nodes))
