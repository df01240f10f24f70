"""Compact weights of decoding: the layout in which few rows read them fastest, and the products with them.

Decoding waits for memory, so what counts is how fast one pass over the weights goes. Measured on a CPU
(`benchmarks/suite.py --phase decode`): a linear layer in fp32 reads [in, out] up to a third faster than [out, in]; one
in bf16 reads [out, in] up to a third faster, and for one row a plain sum of products, which torch.compile turns into
one loop, is about twice as fast as the library's product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Linear


def store_inputs(weight: Tensor) -> Tensor:
    """Stacked input projections [out, H], in memory as decode steps read them."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return weight.t().contiguous().t()
    return weight


def store_output(columns: Tensor) -> Tensor:
    """Kept columns [kept, H] of an output projection as a weight [H, kept]."""
    return columns.t().contiguous()


def compact_linear(x: Tensor, linear: Linear) -> Tensor:
    """x [B, T, in] through a compact weight [out, in]: [B, T, out] in x's dtype."""
    weight, bias = linear
    out = _dot(x, weight) if _one_row(x, weight) else F.linear(x, weight)
    return out if bias is None else out + bias  # for few rows cheaper than a bias inside the product


def _one_row(x: Tensor, weight: Tensor) -> bool:
    """Whether to write the product out: a compiled decode step of one sequence on a CPU, in half precision."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return x.device.type == "cpu" and weight.dtype != torch.float32 and x.shape[0] * x.shape[1] == 1


def _dot(x: Tensor, weight: Tensor) -> Tensor:
    """[1, 1, in] -> [1, 1, out], summed in fp32."""
    return (x.float().unsqueeze(-2) * weight.float()).sum(-1).to(x.dtype)
