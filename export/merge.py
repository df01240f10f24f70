"""Both phases in one file: `If` a call is long enough it selects, else it reuses the compact weights it is given.

The weights lie outside of both branches, once. Compact weights and the history are initializers that are graph inputs
too: a host that does not know them leaves them out, and then decoding runs the whole weights.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx_ir.passes.common as passes
from onnxscript import ir

from .compact_ops import use_compact_ops
from .layers import Layers
from .ports import Port, homes
from .repeat import position_of, rename, repeat
from .simplify import group_heads, skip_single_splits, widen_bfloat16

MIN_SELECT = "pp_min_select_tokens"
"""Input with a default: calls of at least so many tokens select."""
KEEP_LOGITS = "num_logits_to_keep"
"""Input with a default, 0: logits of so many last tokens alone are computed; 0 means all (as in transformers.js)."""


class Outside:
    """What lies around the two branches: inputs, weights, and the optional inputs with their defaults.

    Attributes:
        inputs: that every call gives, by name.
        optional: initializers that are inputs too.
        weights: the other initializers.
        homes: see `ports.homes`.
        tensors: names of all parameters and buffers.
        names: of the parameters; a tied one has the first of its names.
        turned: fingerprint of a transposed weight outside of the layers -> its name; the exporter folds transposes.
    """

    def __init__(self, model: Any, layers: Layers, ports: list[Port], min_select_tokens: int) -> None:
        self.model, self.layers, self.ports = model, layers, ports
        self.inputs: dict[str, ir.Value] = {}
        self.optional: dict[str, ir.Value] = {}
        self.weights: dict[str, ir.Value] = {}
        self.homes = homes(layers.path, ports)
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self.tensors = {name for name, _ in named}
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.turned = {
            _fingerprint(_array(p.t()).numpy()): f"{name}.T"
            for name, p in model.named_parameters()
            if p.ndim == 2 and not name.startswith(f"{layers.path}.")
        }
        self.optional[KEEP_LOGITS] = _initializer(KEEP_LOGITS, np.array(0, np.int64))
        self.optional[MIN_SELECT] = _initializer(MIN_SELECT, np.array(min_select_tokens, np.int64))
        for port in ports:
            for key, tensor in port.history().items():
                self._option(f"pp_history.{port.name}.{key}", tensor)
            for key, tensor in port.dense().items():
                self._option(f"pp_compact.{port.name}.{key}", tensor)

    def _option(self, name: str, tensor: Any) -> None:
        self.optional[name] = _initializer(name, _array(tensor))

    def path(self, name: str, index: int) -> str:
        """`layer.1.mlp.up_proj.weight` of a representative -> the weight's path in layer `index` of the model."""
        return f"{self.layers.path}.{index}.{name.split('.', 2)[2]}"

    def moved(self, name: str) -> bool:
        """Whether a representative's weight is one that the layers keep among the compact weights."""
        return self.path(name, self.layers.first[position_of(name)]) in self.homes  # type: ignore[index]

    def value(self, name: str, index: int, nodes: list[ir.Node]) -> ir.Value:
        """What takes the place of a representative's input in layer `index`; may add nodes before the layer."""
        if not name.startswith("layer."):
            name = rename(name, position_of(name), index)  # type: ignore[arg-type]
            return self.inputs.get(name) or self.optional[name]
        path = self.path(name, index)
        if path not in self.homes:
            return self.weight(path)
        found = self.optional[self.homes[path]]
        if len(found.shape) == 2:  # type: ignore[arg-type]
            return found
        columns = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", [-1, found.shape[2]])])  # type: ignore[index]
        flat = ir.Node("", "Reshape", [found, columns.outputs[0]])
        for node in (columns, flat):
            node.outputs[0].name = f"{path}/{node.op_type}"
            nodes.append(node)
        return flat.outputs[0]

    def weight(self, path: str) -> ir.Value:
        """A parameter or buffer of the model, transposed where the path ends in `.T`."""
        name, turned = path.removesuffix(".T"), path.endswith(".T")
        module, _, leaf = name.rpartition(".")
        tensor = getattr(self.model.get_submodule(module), leaf)
        path = self.names.get(id(tensor), name) + ".T" * turned
        if path not in self.weights:
            tensor = tensor.t() if turned else tensor
            self.weights[path] = _initializer(path, _array(tensor))
        return self.weights[path]

    def constant(self, value: ir.Value) -> ir.Value:
        """An initializer of a phase; those of equal content are stored once."""
        name = str(value.name)
        if name.removeprefix("model.") in self.tensors and name.startswith("model."):
            return self.weight(name.removeprefix("model."))  # others are constants, which the exporter names so, too
        array = value.const_value.numpy()  # type: ignore[union-attr]
        content = _fingerprint(array)
        if content in self.turned:
            return self.weight(self.turned[content])
        name = f"constant.{content[:16]}"
        if name not in self.weights:
            self.weights[name] = ir.Value(
                name=name, type=value.type, shape=value.shape, const_value=ir.tensor(array, name=name)
            )
        return self.weights[name]


def merge(prefill: ir.Model, decode: ir.Model, outside: Outside) -> ir.Model:
    """One model out of the two phases, each traced with one representative of every kind of layer."""
    for value in prefill.graph.inputs:
        if position_of(value.name) is None:
            outside.inputs[str(value.name)] = _copy(value, str(value.name))
    for index, kind in enumerate(outside.layers.kinds):
        for part in ("key", "value"):
            like = next(v for v in prefill.graph.inputs if v.name == f"past_key_values.{kind}.{part}")
            outside.inputs[f"past_key_values.{index}.{part}"] = _copy(like, f"past_key_values.{index}.{part}")
    for value in decode.graph.inputs:  # compact weights have as many rows as their selection keeps units
        if str(value.name).startswith("pp_compact."):
            position = position_of(value.name)
            for index, kind in enumerate(outside.layers.kinds):
                if kind == position:
                    outside.optional[rename(str(value.name), position, index)].shape = value.shape
    phases = [_phase(m, outside) for m in (prefill, decode)]
    names = sorted((str(v.name) for v in phases[0][1]), key=_order)
    then = _branch(*phases[0], "prefill", names, outside)
    outputs = [_output(n, v) for n, v in zip(names, then.outputs, strict=True)]
    otherwise = _branch(*phases[1], "decode", names, outside)
    length = ir.Node("", "Shape", [outside.inputs["input_ids"]], [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)])
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
    widen_bfloat16(model)
    group_heads(model)
    skip_single_splits(model)
    use_compact_ops(model)
    passes.RemoveUnusedNodesPass()(model)
    graph = model.graph
    for value in graph.inputs:
        if position_of(value.name) is None:
            ir.convenience.replace_all_uses_with(value, outside.inputs[str(value.name)])
    for value in graph.initializers.values():
        ir.convenience.replace_all_uses_with(value, outside.constant(value))
    _keep_logits(graph, outside)
    _store_transposed(graph, outside)
    before: list[ir.Node] = []
    outputs = repeat(graph, outside.layers.kinds, lambda name, index: outside.value(name, index, before))
    nodes = list(graph)
    graph.remove(nodes)
    return [*before, *nodes], outputs


def _keep_logits(graph: ir.Graph, outside: Outside) -> None:
    """Cut the LM head's input to its last rows: a prompt needs no others, and the head is a large part of its work."""
    head = outside.model.get_output_embeddings().weight
    names = [n for n, p in outside.model.named_parameters(remove_duplicate=False) if p is head]
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        while weight is not None and weight.producer() is not None and weight.producer().op_type == "Transpose":
            weight = weight.producer().inputs[0]  # type: ignore[union-attr]
        if weight is None or str(weight.name).removesuffix(".T") not in names:
            continue
        kept, hidden = outside.optional[KEEP_LOGITS], node.inputs[0]
        steps = [
            ir.Node("", "Neg", [kept]),
            ir.Node("", "Constant", [], [ir.AttrInt64("value_int", 0)]),
            ir.Node("", "Constant", [], [ir.AttrInt64("value_int", -(2**62))]),
            ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", [1])]),
            ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", [2**62])]),
        ]
        negative, zero, first, axis, end = (s.outputs[0] for s in steps)
        steps.append(ir.Node("", "Equal", [kept, zero]))
        steps.append(ir.Node("", "Where", [steps[-1].outputs[0], first, negative]))
        steps.append(ir.Node("", "Reshape", [steps[-1].outputs[0], axis]))
        steps.append(ir.Node("", "Slice", [hidden, steps[-1].outputs[0], end, axis]))
        for index, step in enumerate(steps):
            step.outputs[0].name = f"kept_logits_{index}"
        graph.insert_before(node, steps)
        node.replace_input_with(0, steps[-1].outputs[0])
        return


def _store_transposed(graph: ir.Graph, outside: Outside) -> None:
    """A layer's weight that a node transposes becomes an input that lies transposed in the file."""
    made: dict[str, ir.Value] = {str(v.name): v for v in graph.inputs}
    for node in list(ir.traversal.RecursiveGraphIterator(graph)):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not str(source.name).startswith("layer.") or source.producer() is not None:
            continue
        if list(node.attributes["perm"].value) != [1, 0] or outside.moved(str(source.name)):
            continue
        name = str(source.name)
        name = name.removesuffix(".T") if name.endswith(".T") else f"{name}.T"  # turned twice: Conv1D (GPT-2)
        if name not in made:
            made[name] = ir.Value(name=name, type=source.type, shape=node.outputs[0].shape)
            graph.inputs.append(made[name])
        ir.convenience.replace_all_uses_with(node.outputs[0], made[name])
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]


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
        elif name.startswith("present_history."):
            source = outside.optional[name.replace("present_", "pp_", 1)]
        else:
            source = _empty(outside.optional[name.replace("present_", "pp_", 1)], f"{phase}/{name}/empty", nodes)
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


def _fingerprint(array: Any) -> str:
    """Of a numpy array's type, shape and content."""
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def _order(name: str) -> tuple[int, int]:
    """Logits, keys and values, history, compact weights; layer by layer."""
    prefixes = ["logits", "present.", "present_history.", "present_compact."]
    return next(i for i, p in enumerate(prefixes) if name.startswith(p)), position_of(name) or 0


def _array(tensor: Any) -> Any:
    return tensor.detach().cpu().contiguous()


def _initializer(name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def _output(name: str, value: ir.Value) -> ir.Value:
    """Of the whole graph; a compact weight has rows where the call selects, and none where it does not."""
    found = _copy(value, name)
    if name.startswith("present_compact."):
        found.shape = ir.Shape([f"{name}.rows", *value.shape[1:]])  # type: ignore[index,union-attr]
    return found


def _copy(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape)
