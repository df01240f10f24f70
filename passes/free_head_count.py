"""Let a layer's reshapes work for any number of query heads."""

from __future__ import annotations

import torch
from torch import fx

from ..groups.dataflow import ATTENTION_CORES, cone, shape
from ..runtime import model_calls
from .base import BlockGraph, Pass, PassResult

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default)


class FreeHeadCount(Pass):
    """`view(B, -1, heads, width)` becomes `view(B, T, -1, width)` where a query's heads pass.

    That is on the way to the attention core's query, or, in a layer that writes its attention out, between the linear
    layers and the output projection. The result is the same for all heads, and it is right for some of them too.
    Whether the heads are separable is proved later (`pp_fx.groups.prove`).
    """

    def call(self, block: BlockGraph) -> PassResult:
        graph = block.graph
        sizes = {str(n.meta["val"]): n for n in graph.nodes if n.target is aten.sym_size.int and "val" in n.meta}
        linears = {n for n in graph.nodes if n.target is aten.linear.default}
        caches = [n for n in graph.nodes if n.target is model_calls.kv_update]
        cores = [n for n in graph.nodes if n.target in ATTENTION_CORES]
        matches = 0
        for core in cores:
            query = core.args[1]
            between, _ = cone([query], {*linears, *caches})  # type: ignore[list-item]
            matches += sum(_free(n, {shape(query)[1]}, sizes) for n in between)  # type: ignore[arg-type,index]
        for cache in caches if not cores else ():
            heads, width = (shape(cache.args[i])[axis] for i, axis in ((1, 1), (2, 3)))  # type: ignore[arg-type,index]
            for linear in linears:
                between, met = cone([linear.args[0]], {*linears, cache})  # type: ignore[list-item]
                if cache in met:
                    matches += sum(_free(n, {heads, heads * width}, sizes) for n in between)
        return PassResult(matches)


def _free(node: fx.Node, counts: set[int], sizes: dict[str, fx.Node]) -> bool:
    """Write the number of heads (or of their columns) as -1, and what was -1 as the size that it was."""
    if node.target not in _RESHAPES:
        return False
    wanted, found = list(node.args[1]), shape(node)  # type: ignore[arg-type]
    fixed = [i for i, size in enumerate(wanted) if isinstance(size, int) and size in counts]
    if not fixed or found is None:
        return False
    if -1 in wanted:
        rest = wanted.index(-1)
        if str(found[rest]) not in sizes:
            return False
        wanted[rest] = sizes[str(found[rest])]
    wanted[fixed[0]] = -1
    node.args = (node.args[0], wanted)  # type: ignore[assignment]
    return True
