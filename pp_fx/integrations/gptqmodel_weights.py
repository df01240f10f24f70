"""What gptqmodel holds in a linear layer of a GPTQ or AWQ checkpoint, as numbers and scales.

Both formats (https://github.com/ModelCloud/GPTQModel) put unsigned numbers into words of 32 bits, from the lowest bits
on, with a scale and a zero point, packed in the same way, for each group of input features. GPTQ's words run along the
inputs, AWQ's along the outputs, and in AWQ's the numbers lie in an order of their own.

Files of GPTQ's first version hold zero points less one. The kernels named here want them as they are, so gptqmodel adds
the one when it loads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .packing import AGAIN, Numbers, Packing

_GPTQ = ("torch", "torch_aten_kernel", "torch_cpu_avx512")
_AWQ = ("awq_torch", "awq_torch_aten_kernel", "torch_cpu_avx512_awq")
"""Kernels, as their QUANT_TYPE names them, that leave the file's words alone, at least until their first call."""
_TORCH = "load with GPTQConfig(bits=.., backend='torch') or AwqConfig(backend='torch_awq')"
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ each of eight neighbours lies."""


def _refusal(module: Any) -> str | None:
    kernel = getattr(module, "QUANT_TYPE", None)
    if kernel not in _GPTQ + _AWQ or type(module).__name__.endswith("Embeddings"):
        return f"is gptqmodel's {type(module).__name__}, which keeps its numbers in an order of its own; {_TORCH}"
    bits, inputs, outputs, group = module.bits, module.in_features, module.out_features, module.group_size
    widths = (4,) if kernel in _AWQ else (2, 4, 8)
    if bits not in widths:
        return f"has numbers of {bits} bits, of which words are not filled evenly; quantize with one of {widths}"
    if inputs % group:
        return f"has {inputs} input features in groups of {group}, the last of them smaller; quantize in equal groups"
    packed = (inputs, _words(outputs, bits)) if kernel in _AWQ else (_words(inputs, bits), outputs)
    if module.qweight.dtype != torch.int32 or module.qweight.shape != packed:
        return f"was run already, which packed its weight anew; {AGAIN}"
    if kernel in _GPTQ and not torch.equal(module.g_idx.cpu(), torch.arange(inputs, dtype=torch.int32) // group):
        return "has its columns in the order of their activations (actorder); quantize with desc_act=False"
    if module.adapter is not None or module.online_full_had or module.online_partial_had:
        return "has an adapter or rotates its input, which the layer in its place would not; load without either"
    return None


def _words(count: int, bits: int) -> int:
    return math.ceil(count * bits / 32)


def _numbers(module: Any) -> Numbers:
    bits, inputs, outputs = module.bits, module.in_features, module.out_features
    if module.QUANT_TYPE in _AWQ:
        codes, zeros = (_in_order(_unpacked(words, bits)).t() for words in (module.qweight, module.qzeros))
    else:
        codes, zeros = _unpacked(module.qweight.t(), bits), _unpacked(module.qzeros, bits).t()
    codes, zeros = ((part - (1 << bits - 1)).view(torch.int8) for part in (codes[:, :inputs], zeros[:outputs]))
    return Numbers(codes, module.scales.t(), zeros if bool(zeros.any()) else None, bits, False)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Words int32 [n, m] as their numbers uint8 [n, m * 32 / bits]; none of them crosses a byte."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    return (words.contiguous().view(torch.uint8)[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def _in_order(numbers: Tensor) -> Tensor:
    """Numbers [n, m] of AWQ's words, each in its place."""
    return numbers.unflatten(-1, (-1, 8))[..., list(_AWQ_PLACES)].flatten(-2)


GPTQMODEL = Packing(_refusal, _numbers)
