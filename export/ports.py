"""What enters and leaves an exported graph for every pruned group: its history and its selection.

A selection travels as compact weights: the kept rows of the input projections and the kept columns of the output
projection, correction and compensation included. So decoding reads nothing but what runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Kind
from ..groups.group import Group
from ..groups.projections import Projection
from ..rewrite.layer import layers_of, output_weight
from ..runtime.compact import CompactLinear
from ..runtime.names import LAYER
from ..runtime.selections import Selection
from ..runtime.state import GroupState
from .names import COMPACT, of_group


@dataclass(frozen=True)
class Port:
    """One pruned group of one layer.

    Attributes:
        index: of the layer.
        kind: "mlp" or "attention".
        layer: the rewritten layer.
    """

    index: int
    kind: Kind
    layer: Any

    @property
    def name(self) -> str:
        """`3.mlp`, part of every input and output name."""
        return f"{self.index}.{self.kind}"

    @property
    def state(self) -> GroupState:
        return self.layer.states()[self.kind]

    @property
    def group(self) -> Group:
        return self.layer.groups[self.kind]

    @property
    def inputs(self) -> list[tuple[str, Projection]]:
        """The input projections by label; parts of one fused layer are numbered."""
        labels = [part.label for part in self.group.inputs]
        numbered = [f"{name}{i}" if labels.count(name) > 1 else name for i, name in enumerate(labels)]
        return list(zip(numbered, self.group.inputs, strict=True))

    @property
    def travels(self) -> bool:
        """Whether a prompt's selection leaves the graph, for the steps that reuse it."""
        return not self.layer.__dict__[LAYER].settings.steps

    @property
    def learns(self) -> bool:
        """Whether prefill updates the history."""
        return self.state.energy is not None and self.state.mode == "run"

    def history(self) -> dict[str, Tensor]:
        """The present history by name, fp32; empty where there is none or it is frozen."""
        return self.state.history(learned=True) if self.learns else {}

    @contextlib.contextmanager
    def with_history(self, given: dict[str, Tensor]) -> Iterator[None]:
        """The state works on copies of the given tensors."""
        buffers = self.state._buffers
        before = {key: buffers[key] for key in given}
        try:
            buffers.update({key: value.clone() for key, value in given.items()})
            yield
        finally:
            buffers.update(before)

    def dense(self) -> dict[str, Tensor]:
        """The selection that keeps every unit: `compact` of the whole weights."""
        layer, group, state = self.layer, self.group, self.state
        found = {"kept": torch.arange(state.units, device=state.column.device)}
        for label, part in self.inputs:
            weight = layer.get_parameter(part.path)
            weight = weight.t() if part.transposed else weight
            rows = slice(None) if part.rows is None else list(part.rows)
            found[label] = self._units(weight[rows])
            if part.bias is not None:
                found[f"{label}_bias"] = layer.get_parameter(str(part.bias.target))[rows]
        weight = output_weight(layer, group)
        bias = group.output.bias
        found["output"] = self._units(weight.t())
        found["output_bias"] = weight.new_zeros(len(weight)) if bias is None else layer.get_parameter(str(bias.target))
        return {key: value.detach() for key, value in found.items()}

    def compact(self, selection: Selection) -> dict[str, Tensor]:
        """A selection's tensors: `kept` int64 [k]; weights [k, H] of an MLP, [k, D, H] of attention; biases."""
        assert selection.inputs is not None or not self.group.inputs
        assert selection.output is not None
        found = {"kept": selection.kept}
        for (label, _), (linear, _) in zip(self.inputs, selection.inputs or [], strict=True):
            found[label] = self._units(linear.weight)
            if linear.bias is not None:
                found[f"{label}_bias"] = linear.bias
        weight, bias = selection.output.weight, selection.output.bias
        found["output"] = self._units(weight.t())
        found["output_bias"] = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return found

    def selection(self, compact: dict[str, Tensor]) -> Selection:
        """Inverse of `compact`."""
        kept, version = compact["kept"], self.layer.__dict__[LAYER].version
        columns = self.state.columns_of(kept)
        inputs = [CompactLinear(self._rows(compact[label]), compact.get(f"{label}_bias")) for label, _ in self.inputs]
        output = CompactLinear(self._rows(compact["output"]).t(), compact["output_bias"])
        return Selection.given(kept, columns, version, inputs, output)

    def _units(self, rows: Tensor) -> Tensor:
        """[k * width, H] -> [k, width, H] of attention: the number of units is an axis of its own."""
        return rows.unflatten(0, (-1, self.state.width)) if self.kind == "attention" else rows

    def _rows(self, units: Tensor) -> Tensor:
        return units.flatten(0, 1) if self.kind == "attention" else units


def ports_of(model: nn.Module) -> list[Port]:
    """The pruned groups of a transformed model, in layer order."""
    return [
        Port(i, kind, layer)
        for i, layer in enumerate(layers_of(model))
        for kind, state in layer.states().items()
        if state.prunes
    ]


def homes(path: str, ports: list[Port]) -> dict[str, str]:
    """Weights that lie in the file as the default of a compact weight: parameter name -> input name.

    `.T` behind a parameter's name: it lies transposed. Parts of fused weights are not among them.

    Args:
        path: of the layers in the model.
    """
    found = {}
    for port in (p for p in ports if p.travels):
        for label, part in port.inputs:
            if part.rows is None and not part.transposed:
                found[f"{path}.{port.index}.{part.path}"] = of_group(COMPACT, port.name, label)
        if not port.group.output.transposed:
            found[f"{path}.{port.index}.{port.group.output.path}.T"] = of_group(COMPACT, port.name, "output")
    return found
