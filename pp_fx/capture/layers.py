"""Which modules of a model are its decoder layers, and which of them are alike."""

from __future__ import annotations

import inspect

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UnsupportedModelError

CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""What layers call the KV cache: from transformers 5.24 on, before, and in some older models."""


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and ModuleList of the decoder layers, found by type and length.

    Raises:
        UnsupportedModelError: not a transformers decoder, an encoder, no list of decoder layers, or shared layers.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"model={type(model).__name__} is no transformers model; load one with AutoModelForCausalLM"
        )
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"model={name} is an encoder-decoder; only decoder-only models are supported")
    layers = config.get_text_config(decoder=True).num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers > 0:
            if all(isinstance(m, GradientCheckpointingLayer) for m in module) and _is_decoder(module[0]):
                _refuse_shared(module)
                return path, module
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0)
    others = [m for m in lists if all(isinstance(x, GradientCheckpointingLayer) for x in m) and _is_decoder(m[0])]
    if len(others) == 1:
        raise UnsupportedModelError(
            f"model={name} has {len(others[0])} decoder layers, its configuration says num_hidden_layers={layers}; set "
            "model.config.num_hidden_layers to what it has"
        )
    raise UnsupportedModelError(
        f"model={name} has no list of {layers} decoder layers; only causal language models are supported"
    )


def _refuse_shared(layers: nn.ModuleList) -> None:
    """Histories and selections belong to a place in the model, so every place needs a module of its own."""
    for i, layer in enumerate(layers):
        first = next(j for j, other in enumerate(layers) if other is layer)
        if first < i:
            raise UnsupportedModelError(
                f"decoder layers {first} and {i} share one module; give each its own (copy.deepcopy) before transform"
            )


def signature_of(layer: nn.Module) -> inspect.Signature:
    """Of a layer's forward, as its class defines it, without `self`."""
    signature = inspect.signature(inspect.unwrap(type(layer).forward))
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _is_decoder(layer: nn.Module) -> bool:
    causal = [m.is_causal for m in layer.modules() if hasattr(m, "is_causal")]
    return any(name in CACHE_NAMES for name in signature_of(layer).parameters) and all(causal)


def structure_key(layer: nn.Module) -> tuple:
    """Layers with equal keys have the same graph: same module tree, plain attributes and parameter shapes."""
    plain = (int, float, bool, str, type(None), tuple, list)
    rows = []
    for name, module in layer.named_modules():
        attributes = tuple(
            sorted(
                (key, repr(value))
                for key, value in module.__dict__.items()
                if key not in ("layer_idx", "training") and not key.startswith("_") and isinstance(value, plain)
            )
        )
        shapes = tuple((k, None if p is None else (tuple(p.shape), p.dtype)) for k, p in module._parameters.items())
        rows.append((name, type(module), attributes, shapes))
    return tuple(rows)
