"""What the layers of one structure share: the captured and rewritten graph, its channel groups, its probes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..capture.calls import masks_are_inverted, record_calls
from ..capture.layers import structure_key
from ..capture.reads import Reads
from ..capture.trace import capture_layer
from ..config import Kind, ProbePruningConfig
from ..errors import UnsupportedModelError
from ..groups.group import Group
from ..layouts import refusal
from ..passes import BlockGraph, Cut, probe_pruning
from ..ranks import agreed
from ..runtime import probe
from ..runtime.model_calls import register_attention
from .layer import block_class, compile_graph
from .tensor_parallel import as_local, cut_of

_CAPTURING = threading.RLock()
"""torch.export is not thread-safe."""


@dataclass
class Structure:
    """One distinct structure of decoder layers.

    Attributes:
        cls: class of the rewritten layers.
        groups: group kind -> group.
        probes: group kind -> the probe branch as a function.
        factors: group kind -> the factor of a gate as a function; of a gated MLP that decodes by step.
        reprobes: group kind -> whether it can be probed again while decoding.
        reasons: why a branch is left dense.
        reads: the attributes whose values the graph holds.
    """

    cls: type
    groups: dict[Kind, Group]
    probes: dict[Kind, Any]
    factors: dict[Kind, Any]
    reprobes: dict[Kind, bool]
    reasons: list[str]
    reads: Reads


def find_structures(
    model: nn.Module, layers: nn.ModuleList, config: ProbePruningConfig | None = None, group: Any = None
) -> tuple[dict[tuple, Structure], list[Any]]:
    """Capture one layer for each distinct structure (`capture.layers.structure_key`). The model is not changed.

    Args:
        model, layers: the model and its decoder layers.
        config: decides which passes run.
        group: the ranks of a tensor parallel model, of which all raise what one of them does.

    Returns:
        The structures, and a recorded call of every layer.

    Raises:
        CaptureError: a layer cannot be captured.
        UnsupportedModelError: a layer holds weights of which no rows can be taken (packed, distributed).
    """
    cuts = [cut_of(layer) for layer in layers]
    with _CAPTURING, as_local(layers):
        with agreed(group):
            _refuse_weights(layers)
        # what lies around the layers runs, and communicates
        calls = record_calls(model, layers, 3, 7), record_calls(model, layers, 5, 11)
        with agreed(group):
            return _find_structures(model, layers, config, cuts, calls), calls[0]


def _find_structures(
    model: nn.Module,
    layers: nn.ModuleList,
    config: ProbePruningConfig | None,
    cuts: list[Cut | None],
    calls: tuple[list[Any], list[Any]],
) -> dict[tuple, Structure]:
    found: dict[tuple, Structure] = {}
    for i, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "config"):
                register_attention(module)
        key = structure_key(layer)
        if key in found:
            continue
        reads: Reads = {}
        graph = capture_layer(model, layer, (calls[0][i], calls[1][i]), reads)
        block = BlockGraph(graph, inverted_mask=masks_are_inverted(layer, calls[0][i]), cut=cuts[i])
        probe_pruning(config)(block)
        groups = {n.group.kind: n.group for n in block.inserted}
        gates = {n.group.kind: n.gate for n in block.inserted if n.gate is not None}
        found[key] = Structure(
            cls=block_class(type(layer), block.graph, groups, block.groups.reasons, gates),
            groups=groups,
            probes={
                n.group.kind: compile_graph(n.probe_graph, f"{n.group.kind} probe", probe.linear)  # type: ignore[arg-type]
                for n in block.inserted
            },
            factors={
                n.group.kind: compile_graph(n.factor_graph, f"{n.group.kind} factor")
                for n in block.inserted
                if n.factor_graph is not None
            },
            reprobes={n.group.kind: n.reprobes for n in block.inserted},
            reasons=block.groups.reasons,
            reads=reads,
        )
    return found


def _refuse_weights(layers: nn.ModuleList) -> None:
    """Rows and columns can be taken of ordinary tensors, and of quantized ones with a layout (`pp_fx.layouts`)."""
    for name, tensor in (*layers.named_parameters(), *layers.named_buffers()):
        why = refusal(tensor)
        if why is not None:
            raise UnsupportedModelError(f"{name} of the decoder layers {why}")
