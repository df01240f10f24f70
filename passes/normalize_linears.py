"""One form for every linear layer."""

from __future__ import annotations

import torch
from torch import fx

from ..groups.dataflow import is_parameter, shape
from .base import BlockGraph, Pass, PassResult

aten = torch.ops.aten
_TRANSPOSES = (aten.t.default, aten.numpy_T.default)


class NormalizeLinears(Pass):
    """`x @ weight.T` and Conv1D's view, addmm, view become aten.linear, the form that is pruned: the same product."""

    def call(self, block: BlockGraph) -> PassResult:
        matches = 0
        for node in list(block.graph.nodes):
            found = _matmul(node) or _conv1d(node)
            if found is None:
                continue
            matches += 1
            x, weight, bias, transposed = found
            with block.graph.inserting_before(node):
                if transposed:
                    stored, weight = weight, block.graph.call_function(aten.t.default, (weight,))
                    weight.meta["val"] = stored.meta["val"].t()
                linear = block.graph.call_function(aten.linear.default, (x, weight, bias))
                linear.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(linear)
        block.drop_unused()
        return PassResult(matches)


def _matmul(node: fx.Node) -> tuple | None:
    """x @ weight.T with a parameter [out, in]."""
    if node.target is not aten.matmul.default:
        return None
    x, right = node.args
    if right.target not in _TRANSPOSES or not is_parameter(right.args[0]):  # type: ignore[union-attr]
        return None
    return x, right.args[0], None, False  # type: ignore[union-attr]


def _conv1d(node: fx.Node) -> tuple | None:
    """view(addmm(bias, view(x, [-1, in]), weight)) with a parameter [in, out]."""
    if node.target is not aten.view.default or node.args[0].target is not aten.addmm.default:  # type: ignore[union-attr]
        return None
    bias, flat, weight = node.args[0].args  # type: ignore[union-attr]
    if node.args[0].kwargs or flat.target is not aten.view.default or not is_parameter(weight):  # type: ignore[union-attr]
        return None
    x = flat.args[0]
    inside, outside = shape(x), shape(node)
    if len(inside) != 3 or inside[-1] != shape(flat)[-1] or inside[:2] != outside[:2] or len(outside) != 3:  # type: ignore[arg-type,index]
        return None
    return x, weight, bias, True
