"""Which library packed a linear layer, and what compressed-tensors and bitsandbytes hold in one.

compressed-tensors (https://github.com/vllm-project/compressed-tensors) leaves an ordinary `nn.Linear` whose parameters
lie packed until the first call, with the scheme as its attribute; bitsandbytes' 8 bits are a module of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .gptqmodel_weights import GPTQMODEL
from .packing import AGAIN, Numbers, Packing

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
_STRATEGIES = ("tensor", "channel", "group")


def packing_of(module: nn.Module) -> Packing | None:
    """How a module is packed; None where it is not."""
    if getattr(module, "quantization_scheme", None) is not None:
        return _COMPRESSED_TENSORS
    package = type(module).__module__.partition(".")[0]
    if package == "bitsandbytes":
        return _BITSANDBYTES
    return GPTQMODEL if package == "gptqmodel" and hasattr(module, "QUANT_TYPE") else None


def _compressed_refusal(module: Any) -> str | None:
    scheme = module.quantization_scheme
    weights, inputs, status = scheme.weights, scheme.input_activations, module.quantization_status.value
    if type(module) is not nn.Linear or weights is None:
        return "is no linear layer with quantized weights, and only those are converted; quantize Linear alone"
    if status != "compressed":
        return f"was run already, which widened its weight; {AGAIN}"
    if scheme.format is not None and scheme.format not in _FORMATS:
        return f"is packed as {scheme.format}; the formats that can be converted are {', '.join(_FORMATS)}"
    if weights.strategy not in _STRATEGIES or weights.num_bits > 8:
        return f"has scales by {weights.strategy}; quantize with one of the strategies {', '.join(_STRATEGIES)}"
    if hasattr(module, "weight_g_idx"):
        return "has its columns in the order of their activations (actorder); quantize without it"
    if scheme.output_activations is not None or (inputs is not None and not inputs.dynamic):
        return "rounds activations by scales that were set before; quantize with dynamic ones, or the weights alone"
    return None


def _compressed_numbers(module: Any) -> Numbers:
    scheme = module.quantization_scheme
    scales, zeros = module.weight_scale.detach(), getattr(module, "weight_zero_point", None)
    if hasattr(module, "weight_packed"):
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        bits = scheme.weights.num_bits
        shape = torch.Size((module.out_features, module.in_features))
        codes = unpack_from_int32(module.weight_packed.detach(), bits, shape)
        if zeros is not None:
            zeros = unpack_from_int32(zeros, bits, torch.Size((shape[0], scales.shape[-1])), packed_dim=0)
    else:
        codes = module.weight.detach()
    scales = scales.expand(codes.shape[0], -1) if scales.ndim == 2 else scales.expand(codes.shape[0])[:, None]
    if zeros is not None:
        zeros = zeros.detach().to(torch.int8).reshape(-1, scales.shape[1]).expand_as(scales)
        zeros = zeros if bool(zeros.any()) else None
    inputs = scheme.input_activations
    by_token = inputs is not None and inputs.type == "int" and inputs.num_bits == 8 and inputs.strategy == "token"
    return Numbers(codes, scales, zeros, scheme.weights.num_bits, by_token)


def _bitsandbytes_refusal(module: Any) -> str | None:
    if type(module).__name__ != "Linear8bitLt":
        return f"is bitsandbytes' {type(module).__name__}, whose blocks run across rows; load with load_in_8bit=True"
    if module.weight.dtype != torch.int8 or _row_scales(module) is None:
        return "is not quantized yet; move the model to its device first"
    return None


def _row_scales(module: Any) -> Tensor | None:
    """Of a layer's first call on they lie in its state."""
    found: Tensor | None = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return found


def _bitsandbytes_numbers(module: Any) -> Numbers:
    scales: Any = _row_scales(module)
    return Numbers(module.weight.detach().data.as_subclass(Tensor), scales[:, None] / 127, None, 8, False)


_COMPRESSED_TENSORS = Packing(_compressed_refusal, _compressed_numbers)
_BITSANDBYTES = Packing(_bitsandbytes_refusal, _bitsandbytes_numbers)
