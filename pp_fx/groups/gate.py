"""The gate of a gated MLP: state = factor(gate) * up, where the factor alone tells which channels a token needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .dataflow import cone, is_input
from .group import MlpGroup

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """Which of an MLP's input projections is which.

    Attributes:
        gate, up: positions in `group.inputs`.
        factor: the node [B, T, C] that the up projection is multiplied by; it depends on the gate alone.
    """

    gate: int
    up: int
    factor: fx.Node


def find_gate(group: MlpGroup) -> Gate | None:
    """The gate of an MLP, or None: one projection, no plain product, or parameters between the projections."""
    product, nodes = group.output.x, [p.node for p in group.inputs]
    if len(nodes) != 2 or product.target is not aten.mul.Tensor:
        return None
    if any(p.rows is not None and p.range is None for p in group.inputs):
        return None  # rows that lie scattered in a fused weight cannot be read in place
    for factor, up in (product.args, reversed(product.args)):
        if up not in nodes or not isinstance(factor, fx.Node) or factor is up:
            continue
        position = nodes.index(up)
        gate = nodes[1 - position]
        inside, met = cone([factor], {*nodes})
        if met == {gate} and not any(n.op == "get_attr" or is_input(n) for n in inside):
            return Gate(1 - position, position, factor)
    return None


def factor_graph(source: fx.Graph, group: MlpGroup, gate: Gate) -> fx.Graph:
    """The factor as a graph of its own, whose input is the gate projection's output [.., C]."""
    start = group.inputs[gate.gate].node
    inside, _ = cone([gate.factor], {start})
    graph = fx.Graph()
    env = {start: graph.placeholder("gate")}
    for node in source.nodes:
        if node in inside:
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(env[gate.factor])
    graph.lint()
    return graph
