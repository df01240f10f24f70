"""The two phases of a transformed model as functions of tensors alone, traced to ONNX by torch.onnx."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import ir
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import onnx_fusions
from torch import Tensor, nn
from transformers import DynamicCache

from ..config import ProbePruningConfig
from ..rewrite.layer import layers_of
from ..runtime.modes import history_frozen
from ..runtime.selections import put_selections, selections_on
from .functions import DOMAIN, TRANSLATIONS
from .layers import detached, tensors_of, with_tensors
from .names import (
    COMPACT,
    HISTORY,
    INPUT_IDS,
    LOGITS,
    MASK,
    PAST,
    POSITIONS,
    PRESENT,
    PRESENT_COMPACT,
    PRESENT_HISTORY,
    TRACED,
    key_values,
    of_group,
)
from .ports import Port

_TINY = 1e-6
History = dict[str, dict[str, Tensor]]
Compact = dict[str, dict[str, Tensor]]
Weights = list[dict[str, Tensor]]
Past = list[tuple[Tensor, Tensor]]


class Prefill(nn.Module):
    """Selects from its own tokens: logits, keys and values, the updated history, the compact weights."""

    def __init__(self, model: nn.Module, ports: list[Port]) -> None:
        super().__init__()
        self.model, self.ports = model, ports

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Past,
        weights: Weights,
        history: History,
    ):
        with contextlib.ExitStack() as stack:
            for layer, given in zip(layers_of(self.model), weights, strict=True):
                stack.enter_context(with_tensors(layer, given))
            for port in self.ports:
                stack.enter_context(port.with_history(history.get(port.name, {})))
            cache = _cache(past)
            logits, present = _run(self.model, input_ids, attention_mask, position_ids, cache)
            updated = {port.name: port.history() for port in self.ports if port.learns}
            selections: Any = selections_on(cache)
            travelling = (p for p in self.ports if p.travels)
            compact = {p.name: p.compact(selections.layers[p.index][p.kind]) for p in travelling}
        return logits, present, updated, compact


class Decode(nn.Module):
    """Runs the units that an earlier prefill has selected."""

    def __init__(self, model: nn.Module, ports: list[Port], owner: int) -> None:
        super().__init__()
        self.model, self.ports, self.owner = model, ports, owner

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Past,
        weights: Weights,
        compact: Compact,
    ):
        cache = _cache(past)
        with contextlib.ExitStack() as stack:
            for layer, given in zip(layers_of(self.model), weights, strict=True):
                stack.enter_context(with_tensors(layer, given))
            selections = put_selections(cache, self.owner)
            for port in (p for p in self.ports if p.travels):
                selections.layers.setdefault(port.index, {})[port.kind] = port.selection(compact[port.name])
            return _run(self.model, input_ids, attention_mask, position_ids, cache)


def _cache(past: Past) -> DynamicCache:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(past):
        cache.update(keys, values, index)
    return cache


def _run(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> tuple[Tensor, Past]:
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return out.logits, [(layer.keys, layer.values) for layer in layers]


def _tensor_names(kind: str, groups: dict[str, dict[str, Tensor]]) -> list[str]:
    """`pp_history.3.mlp.energy`, ..."""
    return [of_group(kind, group, key) for group, tensors in groups.items() for key in tensors]


def key_value_shapes(model: Any) -> list[tuple[torch.Size, torch.Size]]:
    """Shapes of every layer's keys and values [1, heads, 2, D] as the model itself makes them."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    cache = DynamicCache()
    with torch.no_grad(), history_frozen(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run(model, ids, torch.ones_like(ids), torch.arange(2, device=ids.device)[None], cache)
    layers: list[Any] = cache.layers
    return [(layer.keys.shape, layer.values.shape) for layer in layers]


def trace_prefill(
    model: Any, ports: list[Port], settings: ProbePruningConfig, opset: int, past: list[tuple[torch.Size, torch.Size]]
) -> Any:
    """torch.onnx program of the prefill phase. `past`: shapes of keys and values (`key_value_shapes`)."""
    history = {p.name: p.history() for p in ports if p.learns}
    compact = {p.name: p.dense() for p in ports if p.travels}
    outputs = [*_tensor_names(PRESENT_HISTORY, history), *_tensor_names(PRESENT_COMPACT, compact)]
    # longer than `min_select_tokens`, so that the trace follows the long branch of whatever looks at the length
    length = 8 + settings.min_select_tokens
    inputs = {"history": history}, {"history": {name: dict.fromkeys(group) for name, group in history.items()}}
    names = _tensor_names(HISTORY, history), outputs
    return _export(Prefill(model, ports), model, length, inputs, names, opset, past)


def trace_decode(
    model: Any, ports: list[Port], owner: int, opset: int, past: list[tuple[torch.Size, torch.Size]]
) -> Any:
    """torch.onnx program of the decode phase: a call of any length that reuses a selection."""
    ports = [p for p in ports if p.travels]
    compact = {p.name: p.dense() for p in ports}
    kept = {p.name: f"kept_{p.index}_{p.kind}" for p in ports}
    shapes: dict[str, Any] = {
        name: {key: {} if key == "output_bias" else {0: kept[name]} for key in group} for name, group in compact.items()
    }
    for port in ports:  # biases of the inputs have a number for every column
        for key in compact[port.name]:
            if key.endswith("_bias") and key != "output_bias" and port.state.width > 1:
                shapes[port.name][key] = {0: torch.export.Dim.DYNAMIC}
    inputs = {"compact": compact}, {"compact": shapes}
    names: tuple[list[str], list[str]] = _tensor_names(COMPACT, compact), []
    return _export(Decode(model, ports, owner), model, 3, inputs, names, opset, past)


def _export(
    wrapper: nn.Module,
    model: Any,
    length: int,
    extra: tuple[dict[str, Any], dict[str, Any]],
    names: tuple[list[str], list[str]],
    opset: int,
    shapes_of_past: list[tuple[torch.Size, torch.Size]],
) -> Any:
    """`names`: of the inputs and outputs beside the standard ones."""
    weights = [detached(tensors_of(layer)) for layer in layers_of(model)]
    layers = len(weights)
    batch, past = 2, 7
    weight = model.get_input_embeddings().weight
    device, dtype = weight.device, weight.dtype
    pairs = [[(batch, s[1], past, s[3]) for s in both] for both in shapes_of_past]
    given = {
        "input_ids": torch.ones(batch, length, dtype=torch.int64, device=device),
        "attention_mask": torch.ones(batch, past + length, dtype=torch.int64, device=device),
        "position_ids": torch.arange(past, past + length, device=device).repeat(batch, 1),
        "past": [tuple(torch.zeros(s, dtype=dtype, device=device) for s in both) for both in pairs],
        "weights": weights,
        **extra[0],
    }
    tokens = {0: "batch_size", 1: "sequence_length"}
    shapes = {
        "input_ids": tokens,
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": tokens,
        "past": [({0: "batch_size", 2: "past_sequence_length"},) * 2 for _ in range(layers)],
        "weights": [dict.fromkeys(tensors) for tensors in weights],
        **extra[1],
    }
    standard = [INPUT_IDS, MASK, POSITIONS, *key_values(PAST, layers)]
    standard += [f"{TRACED}.{i}.{name}" for i, tensors in enumerate(weights) for name in tensors]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            wrapper.eval(),
            (),
            kwargs=given,
            dynamic_shapes=shapes,
            input_names=[*standard, *names[0]],
            output_names=[LOGITS, *key_values(PRESENT, layers), *names[1]],
            dynamo=True,
            opset_version=opset,
            custom_translation_table=TRANSLATIONS,
            optimize=False,
            verbose=False,
        )
    # what torch.onnx would do itself, with the model's weights kept as they are: Gemma's norm adds 1 to its own
    with _tiny_sums_hidden(program.model):
        optimize_ir(program.model, should_fold=lambda node: False if _reads_a_weight(node) else None)
    onnx_fusions.fuse(program.model)
    return program


@contextlib.contextmanager
def _tiny_sums_hidden(model: ir.Model) -> Iterator[None]:
    """Inside, sums with a tiny constant are no `Add`: the optimizer takes 1e-8 (Helium's norm) for 0 and drops it."""
    sums = [n for n in model.graph.all_nodes() if n.op_type == "Add" and not n.domain and any(map(_is_tiny, n.inputs))]
    try:
        for node in sums:
            node.domain = DOMAIN
        yield
    finally:
        for node in sums:
            node.domain = ""


def _is_tiny(value: ir.Value | None) -> bool:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 1 and 0 < abs(float(tensor.numpy().reshape(()))) < _TINY


def _reads_a_weight(node: ir.Node) -> bool:
    return any(v is not None and v.is_initializer() and str(v.name).startswith("model.") for v in node.inputs)
