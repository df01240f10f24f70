"""What lies around the two branches of a merged file: inputs, weights, and the optional inputs with their defaults."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from onnxscript import ir

from .layers import Layers
from .names import COMPACT, HISTORY, KEEP_LOGITS, MIN_SELECT, TRACED, of_group, of_kind, position_of, rename
from .ports import Port, homes


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
        self.optional[KEEP_LOGITS] = initializer(KEEP_LOGITS, np.array(0, np.int64))
        self.optional[MIN_SELECT] = initializer(MIN_SELECT, np.array(min_select_tokens, np.int64))
        for port in ports:
            for key, tensor in port.history().items():
                self._option(of_group(HISTORY, port.name, key), tensor)
            for key, tensor in port.dense().items() if port.travels else ():
                self._option(of_group(COMPACT, port.name, key), tensor)

    def _option(self, name: str, tensor: Any) -> None:
        self.optional[name] = initializer(name, _array(tensor))

    def path(self, name: str, index: int) -> str:
        """`layer.1.mlp.up_proj.weight` of a representative -> the weight's path in layer `index` of the model."""
        return f"{self.layers.path}.{index}.{name.split('.', 2)[2]}"

    def moved(self, name: str) -> bool:
        """Whether a representative's weight is one that the layers keep among the compact weights."""
        return self.path(name, self.layers.first[position_of(name)]) in self.homes  # type: ignore[index]

    def value(self, name: str, index: int, nodes: list[ir.Node]) -> ir.Value:
        """What takes the place of a representative's input in layer `index`; may add nodes before the layer."""
        if not of_kind(name, TRACED):
            name = rename(name, position_of(name), index)  # type: ignore[arg-type]
            return self.inputs.get(name) or self.optional[name]
        path = self.path(name, index)
        if path not in self.homes:
            return self.weight(path)
        found = self.optional[self.homes[path]]
        if len(found.shape) == 2:  # type: ignore[arg-type]
            return found
        width = int(found.shape[2])  # type: ignore[index,arg-type]
        columns = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", [-1, width])])
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
            self.weights[path] = initializer(path, _array(tensor))
        return self.weights[path]

    def head_names(self) -> set[str]:
        """Every name that the LM head's weight has (a tied one has two)."""
        head = self.model.get_output_embeddings().weight
        return {name for name, p in self.model.named_parameters(remove_duplicate=False) if p is head}

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


def _fingerprint(array: Any) -> str:
    """Of a numpy array's type, shape and content."""
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def _array(tensor: Any) -> Any:
    return tensor.detach().cpu().contiguous()


def initializer(name: str, array: Any) -> ir.Value:
    """A stored value of this name."""
    tensor = ir.tensor(array, name=name)
    shape: Any = tensor.shape
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
