from __future__ import annotations

from .. import gather, runtime
from ..groups import AttentionGroup, Projection
from .base import BlockGraph, GroupNodes, Pass, PassResult


class GatherChannels(Pass):
    """Projections of a group run only the kept rows (inputs) or columns (output); attention only the kept heads."""

    requires = ("state", "kept")

    def call(self, block: BlockGraph) -> PassResult:
        matches = 0
        for inserted in block.inserted:
            group, nodes = inserted.group, inserted.nodes
            for projection in group.inputs:
                self._replace(block, inserted, projection, gather.gather_rows, ())
                matches += 1
            if isinstance(group, AttentionGroup):
                core = group.core
                with block.graph.inserting_before(core):
                    args = (nodes["state"], nodes["kept"], *core.args)
                    new = block.call(runtime.pruned_attention, args, "attention_kept_heads", core)
                    new.kwargs = core.kwargs
                core.replace_all_uses_with(new)
                block.graph.erase_node(core)
            nodes["output"] = self._replace(block, inserted, group.output, gather.gather_columns, (None,))
            # not group.state: the passes above may have replaced that node
            nodes["branch_state"] = nodes["output"].args[1]  # type: ignore[assignment]
            matches += 1
        return PassResult(matches)

    def _replace(self, block: BlockGraph, inserted: GroupNodes, projection: Projection, function, extra: tuple):
        old, nodes = projection.node, inserted.nodes
        with block.graph.inserting_before(old):
            args = (nodes["state"], old.args[0], projection.weight, projection.bias, nodes["kept"], *extra)
            new = block.call(function, args, f"{projection.label}_kept", old)
        old.replace_all_uses_with(new)
        block.graph.erase_node(old)
        return new
