"""Both phases in one file: `If` a call is long enough it selects, else it reuses the compact weights it is given.

The weights lie outside of both branches, once. Compact weights and the history are initializers that are graph inputs
too: a host that does not know them leaves them out, and then decoding runs the whole weights.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from onnxscript import ir

MIN_SELECT = "pp_min_select_tokens"
"""Input with a default: calls of at least so many tokens select."""


def merge(prefill: ir.Model, decode: ir.Model, defaults: dict[str, Any], min_select_tokens: int) -> ir.Model:
    """One model out of the two phases.

    Args:
        prefill, decode: with the ecosystem's inputs; `pp_history.*` of prefill and `pp_compact.*` of decode become
            initializers that are inputs too.
        defaults: arrays of these initializers by name.
        min_select_tokens: default of `MIN_SELECT`.
    """
    for model in (prefill, decode):
        _name_weights(model)
    graph = prefill.graph
    inputs = {v.name: _copy(v) for v in graph.inputs if v.name not in defaults}
    # shapes as the phases declare them: compact weights have as many rows as their selection keeps units
    shapes = {v.name: v.shape for model in (prefill, decode) for v in model.graph.inputs}
    outer = {MIN_SELECT: _initializer(MIN_SELECT, np.array(min_select_tokens, np.int64), None)}
    outer.update({name: _initializer(name, array, shapes[name]) for name, array in defaults.items()})
    for model in (prefill, decode):
        for name, value in model.graph.initializers.items():
            if name not in outer:
                outer[name] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
    outputs = [_copy(v) for v in graph.outputs]
    then = _branch(prefill, "prefill", inputs, outer, [v.name for v in outputs], {})
    reused = {f"present_history.{n[len('pp_history.') :]}": n for n in defaults if n.startswith("pp_history.")}
    otherwise = _branch(decode, "decode", inputs, outer, [v.name for v in outputs], reused)
    length = ir.Node("", "Shape", [inputs["input_ids"]], [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)])
    asked = ir.Node("", "GreaterOrEqual", [length.outputs[0], outer[MIN_SELECT]])
    condition = ir.Node("", "Squeeze", [asked.outputs[0]])
    choice = ir.Node(
        "", "If", [condition.outputs[0]], [ir.AttrGraph("then_branch", then), ir.AttrGraph("else_branch", otherwise)],
        outputs=outputs,
    )  # fmt: skip
    for node, name in ((length, "length"), (asked, "asked"), (condition, "selects")):
        node.outputs[0].name = f"pp_{name}"
    overridable = [outer[name] for name in (MIN_SELECT, *defaults)]
    merged = ir.Graph(
        [*inputs.values(), *overridable],
        outputs,
        nodes=[length, asked, condition, choice],
        initializers=list(outer.values()),
        opset_imports=dict(graph.opset_imports),
        name="pp_fx",
    )
    functions = [*prefill.functions.values(), *(f for k, f in decode.functions.items() if k not in prefill.functions)]
    model = ir.Model(merged, ir_version=prefill.ir_version, producer_name="pp_fx", functions=functions)
    model.opset_imports.update(prefill.opset_imports)
    return model


def _branch(
    model: ir.Model,
    phase: str,
    inputs: dict[str, ir.Value],
    outer: dict[str, ir.Value],
    outputs: list[str],
    reused: dict[str, str],
) -> ir.Graph:
    """The graph of a phase as a subgraph of `outputs`, its inputs and initializers replaced by those outside.

    An output that the phase does not make is the outer value that `reused` names, or an empty tensor.
    """
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values()):
        ir.convenience.replace_all_uses_with(value, inputs.get(value.name) or outer[value.name])
    made = {v.name: v for v in graph.outputs}
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    for index, node in enumerate(nodes):
        node.name = f"{phase}/{index}"
        for value in node.outputs:
            value.name = f"{phase}/{value.name}"
    results = []
    for name in outputs:
        if name in made:
            source = made[name] if made[name].producer() is not None else None
            source = source or inputs.get(name) or outer[name]
        elif name in reused:
            source = outer[reused[name]]
        else:
            source = outer[name.replace("present_", "pp_", 1)]
            nothing = np.zeros((0, *source.shape[1:]), source.dtype.numpy())
            source = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(nothing, dtype=source.dtype))])
            nodes.append(source)
            source.outputs[0].name = f"{phase}/{name}/empty"
            source = source.outputs[0]
        last = ir.Node("", "Identity", [source])
        last.outputs[0].name = f"{phase}/{name}"
        if source.name == last.outputs[0].name:
            source.name += "/value"
        last.outputs[0].type, last.outputs[0].shape = source.type, source.shape
        nodes.append(last)
        results.append(last.outputs[0])
    return ir.Graph([], results, nodes=nodes, name=phase)


def _initializer(name: str, array: Any, shape: ir.Shape | None) -> ir.Value:
    tensor = array if isinstance(array, ir.TensorProtocol) else ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape or tensor.shape, const_value=tensor)


def _copy(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape)


def _name_weights(model: ir.Model) -> None:
    """Initializers of equal content get equal names in both phases, so that they are stored once.

    Parameters keep the names they have in transformers; what the exporter computed is named by its content.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        graph.initializers.pop(name)
        if name.startswith("model."):
            value.name = name[len("model.") :]
        else:
            content = hashlib.sha256(value.const_value.tobytes()).hexdigest()[:16]
            dims = "x".join(str(d) for d in value.shape)
            value.name = f"constant.{value.dtype.name.lower()}.{dims}.{content}"
        if value.name in graph.initializers:
            ir.convenience.replace_all_uses_with(value, graph.initializers[value.name])
        else:
            graph.initializers[value.name] = value
