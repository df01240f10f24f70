"""Run only the kept rows, columns and heads."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..groups.dataflow import shape
from ..groups.group import AttentionGroup, Group, MlpGroup
from ..groups.projections import Projection, head_axis
from ..runtime import gather, model_calls, probe
from ..runtime.names import rows_name, state_name
from .base import BlockGraph, GroupNodes, Pass, PassResult

aten = torch.ops.aten


class GatherChannels(Pass):
    """Projections of a group run only the kept rows (inputs) or columns (output); attention only the kept heads."""

    requires = ("state", "kept")
    ensures = ("branch_state", "output")

    def call(self, block: BlockGraph) -> PassResult:
        matches = 0
        for inserted in block.inserted:
            group = inserted.group
            if group.inputs:
                self._inputs(block, inserted)
            if isinstance(group, AttentionGroup):
                self._cut(block, inserted, group)
                if group.core is not None:
                    self._core(block, inserted, group.core)
            elif isinstance(group, MlpGroup):
                self._vectors(block, inserted, group)
            self._output(block, inserted)
            matches += len(group.inputs) + 1
        return PassResult(matches)

    def _inputs(self, block: BlockGraph, inserted: GroupNodes) -> None:
        """One call for all input projections: they read the same input, so decoding can run them as one."""
        group = inserted.group
        parts = (*group.inputs, *group.whole)
        linears = list(dict.fromkeys(p.linear for p in parts))
        first = next(n for n in block.graph.nodes if n in linears)
        with block.graph.inserting_before(first):
            pruned = len(group.inputs)
            weights, biases = (tuple(n.args[i] if len(n.args) > i else None for n in linears) for i in (1, 2))
            layout = tuple((linears.index(p.linear), self._rows(block, inserted, i, p)) for i, p in enumerate(parts))
            linears_args = (first.args[0], weights, biases, layout, pruned)
            ahead = None
            if group.whole and inserted.whole_keys:  # the selection waits for keys and values out of the same layer
                args = (inserted.nodes["state"], block.plan, *linears_args)
                ahead = block.call(gather.rows_ahead, args, inserted.name("inputs_ahead"))
            args = (inserted.nodes["kept"], *linears_args, ahead)
            together = block.call(gather.gather_rows, args, inserted.name("inputs_kept"), **self._step(inserted))
            for position, part in enumerate(parts):
                name = f"{part.label}_kept" if position < pruned else f"{part.label}_whole"
                source = together if position < pruned or ahead is None else ahead
                new = block.call(operator.getitem, (source, position), name, part.node)
                new = self._shaped(block, group, part, new)
                part.node.replace_all_uses_with(new)
        for linear in linears:
            if not linear.users:
                block.graph.erase_node(linear)

    @staticmethod
    def _step(inserted: GroupNodes) -> dict[str, Any]:
        """What `InsertStep` has made of the whole MLP, if it did."""
        return {"step": inserted.nodes["step"]} if "step" in inserted.nodes else {}

    @staticmethod
    def _rows(block: BlockGraph, inserted: GroupNodes, position: int, part: Projection) -> Any:
        """Of a part of a fused weight: its range, or the buffer that lists its rows."""
        if part.rows is None or part.range is not None:
            return part.range
        return block.graph.get_attr(f"{state_name(inserted.group.kind)}.{rows_name(position)}")

    @staticmethod
    def _shaped(block: BlockGraph, group: Group, part: Projection, flat: fx.Node) -> fx.Node:
        """[B, T, C] in the layout of the node that it replaces."""
        axis = head_axis(part.node)
        if axis is None:
            return flat
        width = shape(part.node)[3]  # type: ignore[index]
        heads = block.call(aten.unflatten.int, (flat, 2, (-1, width)), f"{part.label}_heads", part.node)
        return heads if axis == 2 else block.call(aten.transpose.int, (heads, 1, 2), f"{part.label}_by_head", part.node)

    def _cut(self, block: BlockGraph, inserted: GroupNodes, group: AttentionGroup) -> None:
        probes = [n for n in block.graph.nodes if n.target in (probe.take_samples, probe.query_mask)]  # see all heads
        for node in group.cut:
            with block.graph.inserting_after(node):
                new = block.call(gather.gather_heads, (inserted.nodes["kept"], node), f"{node.name}_kept_heads", node)
            users = [group.core] if group.core is not None else [n for n in node.users if n not in (new, *probes)]
            for user in users:
                user.replace_input_with(node, new)

    def _vectors(self, block: BlockGraph, inserted: GroupNodes, group: MlpGroup) -> None:
        for node in group.vectors:
            users = list(node.users)
            with block.graph.inserting_before(next(n for n in block.graph.nodes if n in users)):
                args = (inserted.nodes["kept"], node)
                new = block.call(gather.gather_vector, args, f"{node.name}_kept", node, **self._step(inserted))
            for user in users:
                user.replace_input_with(node, new)

    def _core(self, block: BlockGraph, inserted: GroupNodes, core: fx.Node) -> None:
        with block.graph.inserting_before(core):
            args = (inserted.nodes["state"], inserted.nodes["kept"], *core.args)
            new = block.call(model_calls.pruned_attention, args, "attention_kept_heads", core)
            new.kwargs = core.kwargs
        core.replace_all_uses_with(new)
        block.graph.erase_node(core)

    def _output(self, block: BlockGraph, inserted: GroupNodes) -> None:
        projection, nodes = inserted.group.output, inserted.nodes
        old = projection.node
        with block.graph.inserting_before(old):
            # not group.state: the steps above may have replaced that node
            nodes["branch_state"] = old.args[0]  # type: ignore[assignment]
            args = (nodes["kept"], old.args[0], projection.weight, projection.bias)
            done = nodes.get("step", nodes.get("step_output"))
            given = {} if done is None else {"step": done}
            nodes["output"] = block.call(gather.gather_columns, args, f"{projection.label}_kept", old, **given)
        old.replace_all_uses_with(nodes["output"])
        block.graph.erase_node(old)
