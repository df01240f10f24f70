from __future__ import annotations

import operator

from .. import gather, runtime
from ..groups import AttentionGroup
from .base import BlockGraph, GroupNodes, Pass, PassResult


class GatherChannels(Pass):
    """Projections of a group run only the kept rows (inputs) or columns (output); attention only the kept heads."""

    requires = ("state", "kept")

    def call(self, block: BlockGraph) -> PassResult:
        matches = 0
        for inserted in block.inserted:
            self._inputs(block, inserted)
            if isinstance(inserted.group, AttentionGroup):
                self._core(block, inserted, inserted.group)
            self._output(block, inserted)
            matches += len(inserted.group.inputs) + 1
        return PassResult(matches)

    def _inputs(self, block: BlockGraph, inserted: GroupNodes) -> None:
        """One call for all input projections: they read the same input, so decoding can run them as one."""
        projections = inserted.group.inputs
        with block.graph.inserting_before(projections[0].node):
            weights, biases = (tuple(getattr(p, part) for p in projections) for part in ("weight", "bias"))
            args = (inserted.nodes["kept"], projections[0].node.args[0], weights, biases)
            together = block.call(gather.gather_rows, args, inserted.name("inputs_kept"))
        for position, projection in enumerate(projections):
            old = projection.node
            with block.graph.inserting_before(old):
                new = block.call(operator.getitem, (together, position), f"{projection.label}_kept", old)
            old.replace_all_uses_with(new)
            block.graph.erase_node(old)

    def _core(self, block: BlockGraph, inserted: GroupNodes, group: AttentionGroup) -> None:
        core = group.core
        with block.graph.inserting_before(core):
            args = (inserted.nodes["state"], inserted.nodes["kept"], *core.args)
            new = block.call(runtime.pruned_attention, args, "attention_kept_heads", core)
            new.kwargs = core.kwargs
        core.replace_all_uses_with(new)
        block.graph.erase_node(core)

    def _output(self, block: BlockGraph, inserted: GroupNodes) -> None:
        projection, nodes = inserted.group.output, inserted.nodes
        old = projection.node
        with block.graph.inserting_before(old):
            # not group.state: the steps above may have replaced that node
            nodes["branch_state"] = old.args[0]  # type: ignore[assignment]
            args = (nodes["kept"], old.args[0], projection.weight, projection.bias, None)
            nodes["output"] = block.call(gather.gather_columns, args, f"{projection.label}_kept", old)
        old.replace_all_uses_with(nodes["output"])
        block.graph.erase_node(old)
