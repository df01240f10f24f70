"""The models of quantized.py and quantized_tasks.py: decoder layers in ordinary weights, in int8, in int4."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

from pp_fx.layouts import stored_bytes
from pp_fx.models import load

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONFIGS: dict[str, Any] = {
    "int8": Int8WeightOnlyConfig(version=2),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


def loaded(name: str, weights: str, dtype: str = "bf16") -> tuple[Any, Any]:
    """The model of a dtype with its decoder layers' linear layers in these weights, and its tokenizer."""
    model, tokenizer = load(name, DTYPES[dtype])
    if weights in CONFIGS:
        inside = {id(m) for layer in model.base_model.layers for m in layer.modules() if type(m) is nn.Linear}
        quantize_(model, CONFIGS[weights], lambda module, _: id(module) in inside)
    return model, tokenizer


def block_bytes(model: Any, weights: str) -> int:
    """Of the decoder layers as a file would hold them: numbers of 4 bits in half a byte."""
    parameters = [p for layer in model.base_model.layers for p in layer.parameters()]
    packed = sum(p.numel() for p in parameters if p.ndim == 2) // 2 if weights == "int4" else 0
    return sum(stored_bytes(p) for p in parameters) - packed
