"""Tensor parallel: output projections give partial outputs, which are summed."""

from __future__ import annotations

import torch
from torch import fx

from ..runtime import shard_sum
from ..runtime.names import LAYER
from .base import BlockGraph, Pass, PassResult

aten = torch.ops.aten


class SumShards(Pass):
    """`linear(x, weight, bias)` with a weight cut by column becomes `sum_of_shards(linear(x, weight)) + bias`.

    Before the groups are found: whatever becomes of the linear layer stays in front of the sum.
    """

    def call(self, block: BlockGraph) -> PassResult:
        found = [n for n in block.graph.nodes if n.target is aten.linear.default and self._is_cut(block, n)]
        for linear in found:
            x, weight, bias = (*linear.args, None)[:3]
            linear.args = (x, weight)
            users = list(linear.users)
            with block.graph.inserting_before(linear.next):
                args = (linear, block.graph.get_attr(LAYER))
                summed = block.call(shard_sum.sum_of_shards, args, f"{linear.name}_sum", linear)
                if bias is not None:
                    summed = block.call(aten.add.Tensor, (summed, bias), f"{linear.name}_bias", linear)
            for user in users:
                user.replace_input_with(linear, summed)
        return PassResult(len(found))

    @staticmethod
    def _is_cut(block: BlockGraph, linear: fx.Node) -> bool:
        weight = linear.args[1]
        stored = weight.args[0] if weight.op != "get_attr" else weight  # type: ignore[union-attr]
        return block.cut is not None and str(stored.target) in block.cut.summed  # type: ignore[union-attr]
