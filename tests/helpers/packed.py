"""Models whose linear layers compressed-tensors has packed, in memory, by the name of what users call it."""

import pytest

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams

TOKENS = {"strategy": "token", "dynamic": True}
SCHEMES = {
    "W4A16": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
    "W4A16, zero points": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}},
    "W3A16 by channel": {"weights": {"num_bits": 3, "strategy": "channel"}},
    "W8A16": {"weights": {"num_bits": 8, "strategy": "channel"}},
    "W8A16, zero points": {"weights": {"num_bits": 8, "strategy": "channel", "symmetric": False}},
    "W8A8": {"weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": {"num_bits": 8, **TOKENS}},
    "W8A16 by tensor": {"weights": {"num_bits": 8, "strategy": "tensor"}},
    "FP8": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
    "FP8 by tensor": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
}


def scheme(name):
    """What a config group of a checkpoint says."""
    return QuantizationScheme(targets=["Linear"], **{k: QuantizationArgs(**v) for k, v in SCHEMES[name].items()})


def observed(model, made):
    """The model with this scheme and the scales of its weights, not packed yet: it computes with rounded weights."""
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"all": made}, ignore=["lm_head"], quantization_status="frozen")
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weight, args = module.weight.data.float(), made.weights
            parts = weight.unflatten(1, (-1, args.group_size)) if args.strategy == "group" else weight
            keep = args.strategy == "channel"
            least, most = (
                (weight.min().view(1), weight.max().view(1))
                if args.strategy == "tensor"
                else (parts.amin(-1, keepdim=keep), parts.amax(-1, keepdim=keep))
            )
            scale, zero = calculate_qparams(least, most, args)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero)
    return model


def packed(model, made):
    """The model as a checkpoint of this scheme is loaded."""
    ModelCompressor.from_pretrained_model(observed(model, made)).compress_model(model)
    return model


def save(model, made, path):
    """A checkpoint of this scheme, as llm-compressor writes it; its folder."""
    compressor = ModelCompressor.from_pretrained_model(observed(model, made))
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    return str(path)
