"""Reading a captured graph: cones, the residual stream, and running parts of it on small concrete tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import CaptureError
from ..runtime import model_calls

aten = torch.ops.aten
ATTENTION_CORES = (model_calls.attention,)


def is_parameter(node: Any) -> bool:
    """A `get_attr` node of a tensor."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)


def is_input(node: fx.Node) -> bool:
    """An argument of the layer, or an item of one."""
    origin = node
    while origin.target is operator.getitem and isinstance(first := origin.args[0], fx.Node):
        origin = first
    return origin.op == "placeholder"


def is_mask(node: fx.Node) -> bool:
    """An input [B, 1, T, S]: the attention mask, which reaches a branch only where attention is written out."""
    dims = shape(node) or ()
    return is_input(node) and len(dims) == 4 and not isinstance(dims[2], int) and not isinstance(dims[3], int)


def shape(node: Any) -> Any:
    """Shape seen at capture (symbols for the dynamic sizes), or None for what is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def carries_no_data(node: fx.Node) -> bool:
    """Sizes and dtypes: they depend on a tensor but not on its values."""
    return node.target is aten.sym_size.int or node.target is getattr


def cone(targets: Iterable[fx.Node], stops: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes that `targets` depend on without looking behind `stops`, and the stops that were met."""
    seen: set[fx.Node] = set()
    met: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node in stops:
            met.add(node)
        elif node not in seen and not carries_no_data(node):
            seen.add(node)
            stack += node.all_input_nodes
    return seen, met


def residual_stream(graph: fx.Graph, walls: set[fx.Node]) -> list[fx.Node]:
    """[B, T, H] nodes on a path from hidden_states to the output that crosses no wall.

    Walls are projections, attention cores and cache updates.
    """
    hidden = next(iter(graph.nodes))
    forward = {hidden}
    for node in graph.nodes:
        if node.op == "call_function" and node not in walls and not carries_no_data(node):
            if any(i in forward for i in node.all_input_nodes):
                forward.add(node)
    backward: set[fx.Node] = set()
    stack = list(next(n for n in graph.nodes if n.op == "output").all_input_nodes)
    while stack:
        node = stack.pop()
        if node not in backward and node not in walls:
            backward.add(node)
            stack += node.all_input_nodes
    width = str(shape(hidden))  # by name: sizes that depend on the data (routed experts) cannot be compared
    return [n for n in graph.nodes if n in forward and n in backward and str(shape(n)) == width]


class Execution:
    """Runs parts of a captured graph in float64 on small random tensors: proofs by execution, not by pattern."""

    def __init__(self, graph: fx.Graph, batch: int = 2, length: int = 3, seed: int = 0) -> None:
        self.graph = graph
        self.batch, self.length = batch, length
        self.hidden = next(iter(graph.nodes))
        self.symbols = [str(s) for s in self.hidden.meta["val"].shape[:2]]
        self.generator = torch.Generator().manual_seed(seed)
        self.leaves: dict[fx.Node, Tensor] = {}

    def random(self, node: fx.Node) -> Tensor:
        """A random float64 tensor (ones for integers) of the node's shape at this batch and length, once per node."""
        if node not in self.leaves:
            sizes = {self.symbols[0]: self.batch, self.symbols[1]: self.length}
            dims = [d if isinstance(d, int) else sizes.get(str(d), self.length) for d in node.meta["val"].shape]
            if not node.meta["val"].is_floating_point():  # an index: 1, because 0 would hide what is multiplied by it
                self.leaves[node] = torch.ones(dims, dtype=node.meta["val"].dtype)
                return self.leaves[node]
            self.leaves[node] = torch.rand(dims, generator=self.generator, dtype=torch.float64) + 0.5
        return self.leaves[node]

    def run(self, targets: list[fx.Node], seeds: dict[fx.Node, Any]) -> list[Tensor]:
        """Values of `targets` when the nodes in `seeds` have the given values and all other inputs are random."""
        env: dict[fx.Node, Any] = dict(seeds)
        needed, stack = set(), list(targets)
        while stack:
            node = stack.pop()
            if node not in needed and node not in env:
                needed.add(node)
                stack += node.all_input_nodes
        for node in self.graph.nodes:
            if node in needed and node not in env:
                env[node] = self._value(node, env)
        return [env[t] for t in targets]

    def _value(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node.target is aten.sym_size.int and node.args[0] is self.hidden:
            return (self.batch, self.length)[node.args[1]]  # type: ignore[index]
        if node.target is getattr:
            return torch.float64
        first = node.args[0] if node.args else None
        from_argument = node.target is operator.getitem and isinstance(first, fx.Node) and first.op == "placeholder"
        if node.op in ("placeholder", "get_attr") or from_argument:
            return self.random(node) if shape(node) is not None else None
        if node.target in (*ATTENTION_CORES, model_calls.kv_update, model_calls.call_module):
            raise CaptureError(f"the proof by execution would cross {node.name}")
        args = fx.map_arg(node.args, lambda n: env[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
        if node.target is aten.to.dtype:
            return args[0]  # stay in float64
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # any op may refuse the sizes or the dtype of the proof
            raise CaptureError(f"the proof by execution cannot run {node.name} ({error})") from error
