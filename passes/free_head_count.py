from __future__ import annotations

import torch
from torch import fx

from .. import runtime
from ..dataflow import ATTENTION_CORES, cone, shape
from .base import BlockGraph, Pass, PassResult

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default)


class FreeHeadCount(Pass):
    """`view(B, -1, heads, width)` becomes `view(B, T, -1, width)` on the way to the attention core's query.

    The result is the same for all heads, and it is right for some of them too. Whether the heads are separable is
    proved later (`groups.find_groups`).
    """

    def call(self, block: BlockGraph) -> PassResult:
        sizes = {str(n.meta["val"]): n for n in block.graph.nodes if n.target is aten.sym_size.int and "val" in n.meta}
        walls = {n for n in block.graph.nodes if n.target in (aten.linear.default, runtime.kv_update)}
        matches = 0
        for core in [n for n in block.graph.nodes if n.target in ATTENTION_CORES]:
            query = core.args[1]
            between, _ = cone([query], walls)  # type: ignore[list-item]
            heads = shape(query)[1]  # type: ignore[arg-type,index]
            matches += sum(_free(node, heads, sizes) for node in between if node.target in _RESHAPES)
        return PassResult(matches)


def _free(node: fx.Node, heads: int, sizes: dict[str, fx.Node]) -> bool:
    wanted, found = list(node.args[1]), shape(node)  # type: ignore[arg-type]
    if heads not in wanted or found is None:
        return False
    if -1 in wanted:
        rest = wanted.index(-1)
        if str(found[rest]) not in sizes:
            return False
        wanted[rest] = sizes[str(found[rest])]
    wanted[wanted.index(heads)] = -1
    node.args = (node.args[0], wanted)  # type: ignore[assignment]
    return True
