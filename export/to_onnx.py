"""`onnx`: a transformed model as a folder that onnxruntime and the tools around it load."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from onnxscript import ir

from .._version import __version__
from ..checks import check_choice
from ..errors import ExportError, InputError, StateError
from ..layouts import is_plain
from ..measure.macs import count_macs
from ..process_settings import own_defaults
from ..rewrite.layer import layers_of, settings_of
from ..runtime.modes import guard_lifted
from ..runtime.names import LAYER
from ..runtime.state import states_of
from ..shards import check_whole
from .agreement import compare_with_torch
from .folder import DATA, MODEL, finish, prepare, write_configs
from .functions import add_functions
from .layers import Layers
from .merge import merge
from .outside import Outside
from .passes.quantize import QuantizeWeights
from .ports import Port, ports_of
from .quantized_functions import functions_of
from .quantized_weights import BITS, Quantized, quantize, rounded_weights
from .stateful import write_stateful
from .trace import key_value_shapes, trace_decode, trace_prefill

_OPSETS = (23, 24)
_DTYPES = (torch.float32, torch.float16)
_SMALL = 1024
"""Bytes up to which a tensor stays inside model.onnx."""


@own_defaults()
def onnx(
    model: Any,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    opset: int = 23,
    overwrite: bool = False,
    verify: bool = True,
    weights: str | None = None,
) -> Path:
    """Write a transformed model as `model.onnx` with everything around it that tools expect.

    One file serves both phases: a call of at least `min_select_tokens` tokens selects; a shorter one runs the compact
    weights that it is given, or else the whole weights. See the folder's README.md for inputs and outputs.

    Args:
        model: a transformed causal language model in fp32 or fp16; calibrate it before, the history goes along.
        directory: folder to write; made if need be. It appears only when all of it is written.
        tokenizer: saved along with the model.
        opset: of ONNX, 23 or 24.
        overwrite: replace a folder that an earlier export has written.
        verify: run `pp_fx.export.check` against `model` on a few random tokens.
        weights: "int8" or "int4": round the linear layers' weights (`quantized_weights`), with "int4" embeddings, LM
            head and pruned output projections to 8 bits; `check` compares with the model of rounded weights. None keeps
            the dtype.

    Returns:
        The folder.

    Raises:
        StateError: the model is not transformed, or in training mode.
        InputError: an argument cannot be used.
        ExportError: an optional package is missing, the configuration has no ONNX form, the trace fails, or
            onnxruntime gives other logits than torch. Nothing is left behind.
    """
    ports = _check(model, opset)
    quantized = _quantized(model, weights)
    partial = prepare(directory, overwrite)
    try:
        with rounded_weights(model, quantized):
            graph = build(model, ports, opset)
            if weights is not None:
                QuantizeWeights(quantized)(graph)
                add_functions(graph, functions_of(BITS[weights]))
            ir.save(graph, partial / MODEL, external_data=DATA, size_threshold_bytes=_SMALL)
            write_stateful(partial)
            write_configs(partial, model, tokenizer, _settings(model, ports, opset, weights))
            if verify:
                compare_with_torch(partial, model, ports).require()
        finish(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Path(directory)


def _quantized(model: Any, weights: str | None) -> dict[str, Quantized]:
    """The weights that the file holds in fewer bits."""
    if weights is None:
        return {}
    check_choice("weights", weights, tuple(BITS))
    dtype = model.get_input_embeddings().weight.dtype
    if dtype != torch.float32:
        raise ExportError(f"weights={weights!r} needs a model in fp32, this one is {dtype}; call model.float() before")
    if not settings_of(model).steps:
        raise ExportError(
            f"weights={weights!r} needs decode='auto' or 'step', not {settings_of(model).decode!r}: a selection that "
            "is handed from call to call would travel unquantized"
        )
    return quantize(model, weights)


def build(model: Any, ports: list[Port], opset: int) -> ir.Model:
    """The merged graph of a transformed model with these ports (`ports_of`)."""
    layers, settings = Layers.of(model), settings_of(model)
    owner = layers.all[0].__dict__[LAYER].owner
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter's hints on packages that play no part here
    try:
        shapes = key_value_shapes(model)
        past = [shapes[i] for i in layers.first]
        with layers.cut_down(model):
            traced = layers.representatives(ports)
            prefill = trace_prefill(model, traced, settings, opset, past).model
            decode = trace_decode(model, traced, owner, opset, past).model
    except Exception as error:  # the exporter's exceptions share no base class
        raise ExportError(f"torch.onnx cannot trace this model ({_first_cause(error)})") from error
    finally:
        logging.disable(previous)
    merged = merge(prefill, decode, Outside(model, layers, ports, settings.min_select_tokens))
    add_functions(merged)
    return merged


def _first_cause(error: BaseException) -> str:
    """The first lines of what lies under the exporter's own reports, which hold the whole graph."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).strip().splitlines()[:2])}"


def _check(model: Any, opset: int) -> list[Port]:
    """The model's ports."""
    check_whole(model, "export")
    layers_of(model)
    if model.get_output_embeddings() is None or not hasattr(model, "generation_config"):
        raise ExportError(f"model={type(model).__name__} has no LM head; export a causal language model")
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {p.get("rope_type") for p in (parameters, *parameters.values()) if isinstance(p, dict)}
    rope = next((kind for kind in kinds if kind in ("dynamic", "longrope")), None)
    if rope is not None:
        raise ExportError(
            f"rope_type={rope!r} makes another rotary table for longer texts while it runs, which a graph cannot; load "
            "the model with rope_type='linear' or 'yarn', or without scaling"
        )
    if opset not in _OPSETS or isinstance(opset, bool):
        raise InputError(f"opset={opset!r} is not supported; choose 23 or 24 (fused attention came with 23)")
    if model.training:
        raise StateError("model is in training mode; call model.eval() before the export")
    weight = model.get_input_embeddings().weight
    if weight.dtype not in _DTYPES:
        raise ExportError(
            f"dtype={weight.dtype} is not supported by the exporter; call model.float() or model.half() before"
        )
    quantized = next((name for name, p in model.named_parameters() if not is_plain(p)), None)
    if quantized is not None:
        raise ExportError(f"{quantized} is quantized, which has no ONNX form here; export the model unquantized")
    ports = ports_of(model)
    if not ports and not any(state.steps for state in states_of(model)):
        raise ExportError("the model prunes nothing; transform it with mlp_ratio or attention_ratio above 0")
    if settings_of(model).step_probe is not None:
        raise ExportError("step_probe has no ONNX form; transform with step_probe=None: then the gate itself ranks")
    if settings_of(model).reprobes or settings_of(model).decode == "rolling":
        raise ExportError(
            "decode='probe', decode='rolling' and drift_threshold have no ONNX form; transform with decode='step', "
            "'sticky' or 'dense'"
        )
    return ports


def _settings(model: Any, ports: list[Port], opset: int, weights: str | None) -> dict[str, Any]:
    settings = settings_of(model)
    with guard_lifted(layers_of(model)):  # a graph knows no machine
        macs = count_macs(model, 1, 512)
    card = {
        "name": type(model).__name__,
        "macs": macs.summary + " (1 x 512 tokens)",
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "weights": weights or "of the dtype",
        "opset": opset,
        "mlp": settings.mlp_ratio,
        "attention": settings.attention_ratio,
        "tokens": settings.min_select_tokens,
    }
    return {
        "version": __version__,
        "opset": opset,
        "dtype": card["dtype"],
        "weights": weights,
        "min_select_tokens": settings.min_select_tokens,
        "calibrated": any(port.state.calibrated for port in ports),
        "config": settings.to_dict(),
        "card": card,
    }


__all__ = ["build", "onnx"]
