"""Put every layer back into a graph that was traced with one representative of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxscript import ir

from .functions import DOMAIN
from .names import position_of, rename

Names = Callable[[str, int, int], str]


def repeat(graph: ir.Graph, kinds: list[int], leaf: Callable[[str, int], ir.Value]) -> list[ir.Value]:
    """Repeat the nodes of each representative for all the layers it stands for.

    A node belongs to a representative if it depends on one of its tensors, its keys and values or its hidden state, and
    on nothing behind it. What depends on no layer (masks, rotary tables) is shared by all.

    Args:
        graph: nodes `pp_fx::Boundary` mark where each representative begins and ends; its inputs and outputs carry the
            representative's position as a part of their name (`past_key_values.1.key`, `layer.1.mlp.up_proj.weight`).
        kinds: for every layer the position of its representative.
        leaf: (name of a representative's input, index of a layer) -> the value that takes its place in that layer.

    Returns:
        The outputs: logits first, then those of every layer, layer by layer in the order of the representative's.
    """
    nodes = list(graph)
    owner: dict[ir.Value, int] = {v: position for v in graph.inputs if (position := position_of(v.name)) is not None}
    enters: dict[int, ir.Node] = {}
    leaves: dict[int, ir.Node] = {}
    for node in nodes:
        if node.op_type == "Boundary" and node.domain == DOMAIN:
            (enters if node.attributes["enters"].value else leaves)[node.attributes["position"].value] = node
    last = len(enters)
    parts: list[list[ir.Node]] = [[] for _ in range(last + 1)]
    shared: list[ir.Node] = []
    for node in nodes:
        if node in enters.values() or node in leaves.values():
            position = node.attributes["position"].value
            owner[node.outputs[0]] = position if node.attributes["enters"].value else position + 1
            continue
        if node.op_type == "Shape" and node.inputs[0] in owner and node.inputs[0].producer() is None:
            # sizes are the same in all layers: the first one's tell how many tokens the cache holds
            name = str(node.inputs[0].name)
            node.replace_input_with(0, leaf(name, kinds.index(owner[node.inputs[0]])))
            shared.append(node)
            continue
        found = [owner[v] for v in _reads(node) if v in owner]
        if found:
            parts[max(found)].append(node)
            owner.update(dict.fromkeys(node.outputs, max(found)))
        else:
            shared.append(node)
    outputs = list(graph.outputs)
    made: list[ir.Node] = list(shared)
    hidden: Any = enters[0].inputs[0]
    results: list[list[ir.Value]] = []
    names = {v: str(v.name) for v in outputs}
    own = [[v for v in outputs if position_of(v.name) == position] for position in range(last)]
    for index, kind in enumerate(kinds):
        mapping: dict[Any, Any] = {
            v: leaf(str(v.name), index) for v in graph.inputs if position_of(v.name) == kind and v.uses()
        }
        mapping[enters[kind].outputs[0]] = hidden
        made += [_clone(node, mapping, f"layer{index}/") for node in parts[kind]]
        hidden = mapping.get(leaves[kind].inputs[0], leaves[kind].inputs[0])
        results.append([mapping[v] if v in mapping else _passed_on(v, made) for v in own[kind]])
        for value, old in zip(results[-1], own[kind], strict=True):
            old.name = f"traced/{names[old]}"  # the name is free for the layer's own
            value.name = rename(names[old], kind, index)
            value.type, value.shape = old.type, old.shape
    tail: dict[Any, Any] = {leaves[last - 1].outputs[0]: hidden}
    made += [_clone(node, tail, "") for node in parts[last]]
    common = [v for v in outputs if position_of(names[v]) is None]
    rest = [tail.get(v, v) for v in common]
    for value, old in zip(rest, common, strict=True):
        value.name, value.type, value.shape = names[old], old.type, old.shape
    graph.outputs.clear()
    graph.remove(nodes)
    graph.extend(made)
    return [*rest, *(v for values in results for v in values)]


def _passed_on(value: ir.Value, nodes: list[ir.Node]) -> ir.Value:
    """A value that all layers share, as one of its own: every output has a name."""
    nodes.append(ir.Node("", "Identity", [value]))
    return nodes[-1].outputs[0]


def _reads(node: ir.Node) -> list[ir.Value]:
    """Values that a node or a graph inside it reads."""
    found = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.value:
                found += _reads(inner)
            found += [v for v in attribute.value.outputs if v is not None]
    return found


def _clone(node: ir.Node, mapping: dict[ir.Value, ir.Value], prefix: str) -> ir.Node:
    """A copy that reads what `mapping` says; its outputs join the mapping."""
    attributes: list[Any] = []
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            attribute = ir.AttrGraph(name, _clone_graph(attribute.value, mapping, prefix))
        attributes.append(attribute)
    inputs = [None if v is None else mapping.get(v, v) for v in node.inputs]
    copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), overload=node.overload)
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.type, new.shape = f"{prefix}{old.name}", old.type, old.shape
        mapping[old] = new
    return copy


def _clone_graph(graph: ir.Graph, mapping: dict[ir.Value, ir.Value], prefix: str) -> ir.Graph:
    inner = dict(mapping)
    initializers = []
    for value in graph.initializers.values():
        new = ir.Value(name=f"{prefix}{value.name}", type=value.type, shape=value.shape, const_value=value.const_value)
        initializers.append(new)
        inner[value] = new
    nodes = [_clone(node, inner, prefix) for node in graph]
    outputs = [inner.get(v, v) for v in graph.outputs]
    return ir.Graph([], outputs, nodes=nodes, initializers=initializers, name=graph.name)
