"""Linear layers in a captured graph, and the parts of fused ones (query/key/value or gate/up in one weight)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .dataflow import Execution, cone, is_parameter, shape

aten = torch.ops.aten
_MOVES = {
    operator.getitem,
    *(
        getattr(aten, name)
        for name in (
            *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "swapaxes", "contiguous"),
            *("slice", "split", "split_with_sizes", "chunk", "unbind", "select", "narrow", "squeeze", "unsqueeze"),
        )
    ),
}
"""Ops that move elements and compute nothing."""


def moves(node: fx.Node) -> bool:
    """Whether the node only rearranges what it is given."""
    return node.target in _MOVES or getattr(node.target, "overloadpacket", None) in _MOVES


@dataclass(frozen=True)
class Projection:
    """A linear layer y = x @ weight.T + bias, or a part of its output. Taken before any pass changes the graph.

    Attributes:
        node: the values [B, T, C], [B, T, units, width] or [B, units, T, width].
        linear: the aten.linear call; `node` itself, unless the layer is fused.
        x, weight, bias: its input [B, T, H], weight [out, H] and bias [out] (or None).
        rows: the weight's rows that `node` holds, unit after unit; None for all of them in order.
    """

    node: fx.Node
    linear: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    rows: tuple[int, ...] | None = None

    @classmethod
    def of(cls, linear: fx.Node) -> Projection:
        """The whole output of an aten.linear call."""
        x, weight, bias = (*linear.args, None)[:3]
        return cls(linear, linear, x, weight, bias)  # type: ignore[arg-type]

    @property
    def parameter(self) -> fx.Node:
        """The `get_attr` node of the weight as the module stores it: [out, H], or [H, out] where it is transposed."""
        return self.weight.args[0] if self.transposed else self.weight  # type: ignore[return-value]

    @property
    def transposed(self) -> bool:
        """Whether the module stores the weight as [H, out] (transformers' Conv1D)."""
        return self.weight.op != "get_attr"

    @property
    def path(self) -> str:
        """Of the weight, inside the layer."""
        return str(self.parameter.target)

    @property
    def module(self) -> str:
        """Path of the module that holds the weight, inside the layer."""
        return self.path.rpartition(".")[0]

    @property
    def label(self) -> str:
        """Short name for nodes and tables: `gate` for `mlp.gate_proj`."""
        return self.module.rpartition(".")[2].removesuffix("_proj")

    @property
    def out_features(self) -> int:
        """Rows of the whole weight."""
        return self.weight.meta["val"].shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight.meta["val"].shape[1]

    @property
    def range(self) -> tuple[int, int, int] | None:
        """(start, stop, step) of a part's rows in the weight, or None where they lie scattered (or are all)."""
        if self.rows is None:
            return None
        step = self.rows[1] - self.rows[0] if len(self.rows) > 1 else 1
        found = self.rows[0], self.rows[-1] + 1, step
        return found if step > 0 and self.rows == tuple(range(*found)) else None

    @property
    def share(self) -> float:
        """Rows of this part / rows of the whole weight."""
        return 1.0 if self.rows is None else len(self.rows) / self.out_features


def find_projections(graph: fx.Graph) -> list[Projection]:
    """Every linear layer with a weight of its own, in graph order."""
    return [Projection.of(n) for n in graph.nodes if n.target is aten.linear.default and _is_weight(n.args[1])]


def _is_weight(node: fx.Node) -> bool:
    return is_parameter(node) or (node.target is aten.t.default and is_parameter(node.args[0]))


def find_part(
    graph: fx.Graph,
    whole: Projection,
    value: fx.Node,
    fits: Callable[[fx.Node], bool],
    beside: Collection[fx.Node] = (),
) -> Projection | None:
    """The part of a fused projection that `value` is computed from, apart from what comes through the nodes `beside`.

    It is the first node that only moves elements of the projection, `fits`, and that everything between the projection
    and `value` goes through.
    """
    inside, _ = cone([value], {whole.linear, *beside})
    run, chain = Execution(graph), {whole.linear}
    for node in graph.nodes:
        if node not in inside or not moves(node) or node.all_input_nodes[0] not in chain:
            continue
        chain.add(node)
        if shape(node) is None or not fits(node) or cone([value], {node, whole.linear, *beside})[1] != {node, *beside}:
            continue
        tokens, out = run.batch * run.length, whole.out_features
        code = torch.arange(tokens * out, dtype=torch.float64).view(run.batch, run.length, out)
        (moved,) = run.run([node], {whole.linear: code})
        rows = _rows(moved, head_axis(node), code)
        if rows is not None:
            return Projection(node, whole.linear, whole.x, whole.weight, whole.bias, rows)
    return None


def head_axis(node: fx.Node) -> int | None:
    """1 for [B, units, T, width], 2 for [B, T, units, width], None for [B, T, C]."""
    dims: Any = shape(node) or ()
    if len(dims) != 4:
        return None
    return 1 if isinstance(dims[1], int) else 2


def _rows(moved: Tensor, axis: int | None, code: Tensor) -> tuple[int, ...] | None:
    """The rows in `moved`, unit after unit; None if they differ between tokens or come from another token."""
    flat = (moved.transpose(1, 2) if axis == 1 else moved).flatten(2)
    if flat.shape[:2] != code.shape[:2]:
        return None
    rows = (flat - code[..., :1]).long()
    first = rows[:1, :1]
    if bool((rows != first).any()) or int(first.min()) < 0 or int(first.max()) >= code.shape[2]:
        return None
    return tuple(first.flatten().tolist())


def escapes(graph: fx.Graph, parts: list[Projection]) -> str | None:
    """Name of a node that uses a fused projection's output apart from these parts of it, or None."""
    leaves = {p.node for p in parts}
    between = {p.linear for p in parts} - leaves
    for node in graph.nodes:
        if node not in leaves and moves(node) and node.all_input_nodes[0] in between:
            between.add(node)
    for node in between:
        for user in node.users:
            if user not in between and user not in leaves and user.target is not aten.sym_size.int:
                return user.name
    return None


def shaped(flat: Tensor, node: fx.Node, width: int) -> Tensor:
    """[B, T, units * width] in the layout of `node`, which may hold fewer units."""
    axis = head_axis(node)
    if axis is None:
        return flat
    heads = flat.view(flat.shape[0], flat.shape[1], -1, width)
    return heads.transpose(1, 2) if axis == 1 else heads
