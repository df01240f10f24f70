"""Both phases in one file: `If` a call is long enough it selects, else it reuses the compact weights it is given.

The weights lie outside of both branches, once. Compact weights and the history are initializers that are graph inputs
too: a host that does not know them leaves them out, and then decoding runs the whole weights.
"""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from .names import (
    COMPACT,
    INPUT_IDS,
    LOGITS,
    MIN_SELECT,
    PAST,
    PRESENT,
    PRESENT_COMPACT,
    PRESENT_HISTORY,
    input_of,
    key_value,
    of_kind,
    position_of,
    rename,
)
from .outside import Outside
from .passes import phase_passes
from .repeat import repeat


def merge(prefill: ir.Model, decode: ir.Model, outside: Outside) -> ir.Model:
    """One model out of the two phases, each traced with one representative of every kind of layer."""
    for value in prefill.graph.inputs:
        if position_of(value.name) is None:
            outside.inputs[str(value.name)] = _copy(value, str(value.name))
    for index, kind in enumerate(outside.layers.kinds):
        for part in ("key", "value"):
            like = next(v for v in prefill.graph.inputs if v.name == key_value(PAST, kind, part))
            name = key_value(PAST, index, part)
            outside.inputs[name] = _copy(like, name)
    for value in decode.graph.inputs:  # compact weights have as many rows as their selection keeps units
        if of_kind(value.name, COMPACT):
            position = position_of(value.name)
            for index, kind in enumerate(outside.layers.kinds):
                if kind == position:
                    outside.optional[rename(str(value.name), position, index)].shape = value.shape
    phases = [_phase(m, outside) for m in (prefill, decode)]
    names = sorted((str(v.name) for v in phases[0][1]), key=_order)
    then = _branch(*phases[0], "prefill", names, outside)
    outputs = [_output(n, v) for n, v in zip(names, then.outputs, strict=True)]
    otherwise = _branch(*phases[1], "decode", names, outside)
    length = ir.Node("", "Shape", [outside.inputs[INPUT_IDS]], [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)])
    asked = ir.Node("", "GreaterOrEqual", [length.outputs[0], outside.optional[MIN_SELECT]])
    condition = ir.Node("", "Squeeze", [asked.outputs[0]])
    branches = [ir.AttrGraph("then_branch", then), ir.AttrGraph("else_branch", otherwise)]
    choice = ir.Node("", "If", [condition.outputs[0]], branches, outputs=outputs)
    for node, name in ((length, "length"), (asked, "asked"), (condition, "selects")):
        node.outputs[0].name = f"pp_{name}"
    graph = ir.Graph(
        [*outside.inputs.values(), *outside.optional.values()],
        outputs,
        nodes=[length, asked, condition, choice],
        initializers=[*outside.optional.values(), *outside.weights.values()],
        opset_imports=dict(prefill.graph.opset_imports),
        name="pp_fx",
    )
    functions = [*prefill.functions.values(), *(f for k, f in decode.functions.items() if k not in prefill.functions)]
    return ir.Model(graph, ir_version=prefill.ir_version, producer_name="pp_fx", functions=functions)


def _phase(model: ir.Model, outside: Outside) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes and named outputs of a phase with all layers, reading from outside."""
    phase_passes(outside)(model)
    graph = model.graph
    before: list[ir.Node] = []
    outputs = repeat(graph, outside.layers.kinds, lambda name, index: outside.value(name, index, before))
    nodes = list(graph)
    graph.remove(nodes)
    return [*before, *nodes], outputs


def _branch(nodes: list[ir.Node], made: list[ir.Value], phase: str, names: list[str], outside: Outside) -> ir.Graph:
    """A phase as a subgraph with all outputs. One that it does not make is the optional input, or an empty tensor."""
    own = {str(v.name): v for v in made}
    for index, node in enumerate(nodes):
        node.name = f"{phase}/{index}"
        node.metadata_props.clear()  # where in Python it came from
        for value in node.outputs:
            value.name = f"{phase}/{value.name}"
    inside, results = set(nodes), []
    for name in names:
        if name in own:
            source = own[name]
        elif of_kind(name, PRESENT_HISTORY):
            source = outside.optional[input_of(name)]
        else:
            source = _empty(outside.optional[input_of(name)], f"{phase}/{name}/empty", nodes)
            inside.add(source.producer())  # type: ignore[arg-type]
        if source.producer() not in inside or source in results:  # a branch returns values of its own, each once
            last = ir.Node("", "Identity", [source], name=f"{phase}/{name}/last")
            last.outputs[0].name = f"{phase}/{name}/out"
            last.outputs[0].type, last.outputs[0].shape = source.type, source.shape
            nodes.append(last)
            source = last.outputs[0]
        results.append(source)
    return ir.Graph([], results, nodes=nodes, name=phase)


def _empty(like: ir.Value, name: str, nodes: list[ir.Node]) -> ir.Value:
    """A constant of the same type with no rows."""
    nothing = np.zeros((0, *like.shape[1:]), like.dtype.numpy())  # type: ignore[index,union-attr]
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(nothing))], name=name)
    constant.outputs[0].name, constant.outputs[0].type = name, like.type
    constant.outputs[0].shape = ir.Shape(nothing.shape)
    nodes.append(constant)
    return constant.outputs[0]


def _order(name: str) -> tuple[int, int]:
    """Logits, keys and values, history, compact weights; layer by layer."""
    kinds = (LOGITS, PRESENT, PRESENT_HISTORY, PRESENT_COMPACT)
    return next(i for i, kind in enumerate(kinds) if of_kind(name, kind)), position_of(name) or 0


def _output(name: str, value: ir.Value) -> ir.Value:
    """Of the whole graph; a compact weight has rows where the call selects, and none where it does not."""
    found = _copy(value, name)
    if of_kind(name, PRESENT_COMPACT):
        found.shape = ir.Shape([f"{name}.rows", *value.shape[1:]])  # type: ignore[index,union-attr]
    return found


def _copy(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape)
