"""Models whose linear layers torchao has quantized, by the name of what users call it."""

import warnings

import pytest

pytest.importorskip("torchao", reason="needs torchao")

from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup

QUANTIZATIONS = {
    "int8": lambda: Int8WeightOnlyConfig(version=2),
    "int8, activations too": lambda: Int8DynamicActivationInt8WeightConfig(version=2),
    "float8": lambda: Float8WeightOnlyConfig(version=2),
    "int4 in groups": lambda: _int4(),
}


def _int4():
    import torch

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))


def quantized(model, name, only=None):
    """The model, its decoder layers' linear layers quantized in place; `only`: where the path says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, QUANTIZATIONS[name](), lambda module, path: _inside(module, path) and (only or str)(path))
    return model


def _inside(module, path):
    return type(module).__name__ == "Linear" and any(part.isdigit() for part in path.split("."))
