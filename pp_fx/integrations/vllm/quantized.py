"""Weights that are quantized already: vLLM's own method for them, inside of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin
from vllm import _custom_ops
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ...errors import ConfigError, UnsupportedModelError
from ...layouts import refusal
from ..packing import Numbers
from ..to_torchao import as_torchao

METHODS = ("torchao", "compressed-tensors")
"""Of which weights can be taken."""
_REMEDY = (
    "quantize it with torchao by row (Int8WeightOnlyConfig), or with compressed-tensors to 8-bit integers by channel "
    "with dynamic activations (W8A8), or serve it without quantization='pp_fx'"
)


def inner_config(quantization: QuantizationConfigMixin | None) -> QuantizationConfig | None:
    """vLLM's configuration of the method that quantized the weights.

    Args:
        quantization: transformers' configuration of it; None for plain weights.

    Raises:
        ConfigError: a method of which no weights can be taken, or a quantized KV cache.
    """
    if quantization is None:
        return None
    fields = quantization.to_dict()
    method = fields["quant_method"]
    name = str(getattr(method, "value", method))
    if name not in METHODS:
        raise ConfigError(f"quantization={name!r}: vLLM prunes weights of {' and '.join(METHODS)} alone; {_REMEDY}")
    if fields.get("kv_cache_scheme") is not None:
        raise ConfigError("kv_cache_scheme does not go together with quantization='pp_fx'; leave it out")
    return get_quantization_config(name).from_config(fields)


def own_weight(layer: Any, method: Any, name: str) -> Tensor:
    """A linear layer's weight [out, in] as rows and columns are taken of it: plain, or one of torchao's tensors.

    Args:
        layer: loaded; not packed yet for vLLM's own products.
        method: vLLM's, of the layer.
        name: of the layer, for messages.

    Raises:
        UnsupportedModelError: no rows or columns can be taken of a weight like this.
    """
    if isinstance(method, UnquantizedLinearMethod):
        return layer.weight.data
    scheme = getattr(layer, "scheme", None)
    if scheme is None:
        reason = refusal(layer.weight)
        if reason is not None:
            raise UnsupportedModelError(f"{name}.weight {reason}")
        found: Tensor = layer.weight.detach()
        return found
    kind = type(scheme).__name__
    if kind != "CompressedTensorsW8A8Int8" or scheme.is_static_input_scheme or not scheme.input_symmetric:
        raise UnsupportedModelError(f"{name} is packed by compressed-tensors as {kind}, and is not pruned; {_REMEDY}")
    scales = layer.weight_scale.data
    if scales.ndim == 1:  # one for each of the projections that vLLM has merged
        scales = torch.repeat_interleave(scales, torch.tensor(layer.logical_widths))[:, None]
    return as_torchao(Numbers(layer.weight.data, scales, None, 8, True), torch.get_default_dtype())


def scaled_product(weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """vLLM's own product with 8-bit integers, for a weight that `own_weight` gave or rows or columns of it.

    torchao's product sums the whole weight at every call on a CPU, which a probe of a dozen rows takes most of its time
    for.

    Args:
        weight: [out, in].

    Returns:
        x [N, in] -> [N, out], over a weight that is packed now; None where `torch.nn.functional.linear` is the product:
        of plain weights, of those beside activations that are not rounded, and off a CPU.
    """
    if getattr(weight, "act_quant_kwargs", None) is None or weight.device.type != "cpu":
        return None
    codes: Any = weight
    packed = _custom_ops.create_onednn_scaled_mm(
        codes.qdata.contiguous().t(), codes.scale.float(), weight.dtype, True, False, 32
    )

    def product(x: Tensor) -> Tensor:
        rounded, scales, zeros = _custom_ops.onednn_scaled_int8_quant(x.contiguous(), None, None, True)
        out = x.new_empty(x.shape[0], packed.n)
        _custom_ops.onednn_scaled_mm(packed, rounded, out, scales, zeros, None, None)
        return out

    return product
