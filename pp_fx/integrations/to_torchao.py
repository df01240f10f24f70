"""`to_torchao`: weights that other libraries have packed, as torchao's tensors, number for number."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError, UnsupportedModelError
from ..layouts.layout import rebuilt
from ..rewrite.layer import is_transformed
from .packed_weights import packing_of
from .packing import Numbers

_HOOKS = "has hooks, which the layer in its place would not have; remove them, or load on one device"


def to_torchao(model: nn.Module) -> nn.Module:
    """Hold a model's packed linear layers as torchao's tensors, of which `transform` takes rows and columns.

    For models that compressed-tensors has packed (llm-compressor's W4A16, W8A16, W8A8 and FP8, by tensor, channel or
    group), bitsandbytes' `load_in_8bit`, and GPTQ (2, 4, 8 bits) and AWQ (4 bits) as transformers loads them through
    gptqmodel. No number is rounded anew: 8 bits by channel become `Int8Tensor`, float8 `Float8Tensor`, groups and zero
    points `IntxUnpackedToInt8Tensor` (a byte for each number, whatever its bits). Scales of groups are held in the
    model's dtype: fp16 ones are rounded in a bf16 model.
    Tokens are rounded to 8 bits as before where int8 weights by channel come with dynamic activations; elsewhere they
    are left as they are: float8 activations, those beside weights in groups, and all of bitsandbytes.

    Args:
        model: as `from_pretrained` gave it; not transformed, and with compressed-tensors or gptqmodel not yet called:
            the first call widens the weights, or packs them anew, for good. Changed in place; its configuration no
            longer names the other library.

    Returns:
        The model.

    Raises:
        StateError: the model is transformed.
        UnsupportedModelError: torchao is missing; the model holds no such layers, or one that cannot be converted (by
            name, with the reason). The model is as before.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UnsupportedModelError("to_torchao needs torchao: pip install 'torchao>=0.18'")
    if is_transformed(model):
        raise StateError("model is transformed; call pp_fx.restore(model), then to_torchao, then transform")
    packed = [(name, module, how) for name, module in model.named_modules() if (how := packing_of(module)) is not None]
    if not packed:
        raise UnsupportedModelError(
            "model holds no layers that compressed-tensors, bitsandbytes or gptqmodel have packed; torchao's weights "
            "and ordinary ones are transformed as they are"
        )
    for name, module, how in packed:
        hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
        reason = _HOOKS if hooked else how.refusal(module)
        if reason is not None:
            raise UnsupportedModelError(f"{name} {reason}")
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point and p.itemsize > 1), torch.float32)
    for name, module, how in packed:
        made = _linear(module, as_torchao(how.numbers(module), dtype), dtype)
        model.set_submodule(name, made)
    _forget(model)
    return model


def _linear(module: Any, weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    bias = module.bias
    if isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter):  # gptqmodel's, a buffer in fp16
        bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    made.bias = bias
    return made.train(module.training)


def as_torchao(numbers: Numbers, dtype: torch.dtype) -> Tensor:
    """torchao's tensor of these numbers: the one that it makes of zeros of that shape, with its parts exchanged.

    Args:
        numbers: of a weight [out, in].
        dtype: of what it is multiplied with.
    """
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup

    codes, scales = numbers.codes.contiguous(), numbers.scales.contiguous()
    outputs, inputs = codes.shape
    group = inputs // scales.shape[1]
    parts: dict[str, Any] = {"qdata": codes, "scale": scales.float()}
    config: Any
    if codes.dtype != torch.int8:
        config = Float8WeightOnlyConfig(weight_dtype=codes.dtype, version=2)
    elif group == inputs and numbers.zero_points is None:
        both = Int8DynamicActivationInt8WeightConfig(version=2)
        config = both if numbers.rounds_inputs else Int8WeightOnlyConfig(version=2)
    else:
        granularity = PerAxis(0) if group == inputs else PerGroup(group)
        config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{numbers.bits}"), granularity=granularity)
        zeros = torch.zeros_like(scales) if numbers.zero_points is None else numbers.zero_points
        parts |= {"scale": scales.to(dtype), "zero_point": zeros.to(torch.int8).contiguous()}
    template = nn.Linear(inputs, outputs, bias=False, device=codes.device, dtype=dtype)
    nn.init.zeros_(template.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zeros that have no scale
        quantize_(template, config)
    made: Tensor = rebuilt(template.weight, **parts)
    return made


def _forget(model: Any) -> None:
    """What would widen the weights at the first call, and what would write the other library's name when saved."""
    hook = model.__dict__.pop("ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
    model.__dict__.pop("quantize_config", None)  # optimum's, of GPTQ
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
