"""What runs whole in a decode step."""

from __future__ import annotations

import torch

from ..groups.dataflow import is_parameter
from ..runtime import gather, step
from .base import BlockGraph, Pass, PassResult


class StepLinears(Pass):
    """Linear layers that run whole, attention's above all, run in a decode step by the kernels for few tokens.

    Behind the pass that gives the groups their own products: these are told of the plan.
    """

    requires = ("output",)

    def call(self, block: BlockGraph) -> PassResult:
        own = [n for n in block.graph.nodes if n.target in (gather.gather_rows, gather.gather_columns)]
        for node in own:
            node.update_kwarg("plan", block.plan)
        linears = (n for n in block.graph.nodes if n.target is torch.ops.aten.linear.default)
        found = [n for n in linears if is_parameter(n.args[1])]
        for node in found:
            x, weight, bias = (*node.args, None)[:3]
            with block.graph.inserting_before(node):
                made = block.call(step.linear, (block.plan, x, weight, bias), f"{node.name}_rows", node)
            node.replace_all_uses_with(made)
            block.graph.erase_node(node)
        return PassResult(len(own) + len(found))
