"""Compact weights of decoding: the layout in which few rows read them fastest, and the products with them.

Decoding waits for memory, so what counts is how fast one pass over the weights goes. Measured on a CPU
(`benchmarks/suite.py --phase decode`): a linear layer in fp32 reads [in, out] up to a third faster than [out, in]; one
in bf16 reads [out, in] up to a third faster, and for up to four rows plain sums of products, which torch.compile turns
into one loop over the weight, took a third to two thirds of the time of the library's product, timed alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .cache import Linear

_FEW = 4
"""Rows; from 8 on the library's product is as fast."""


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
    out = _sums(x, weight) if _few_rows(x, weight) else F.linear(x, weight)
    return out if bias is None else out + bias  # for few rows cheaper than a bias inside the product


def _few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether to write the product out: a compiled decode step of few sequences on a CPU, in half precision."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    # a batch size that the compiler keeps open is not narrowed down for this
    few = statically_known_true(x.shape[0] * x.shape[1] <= _FEW)
    return few and x.device.type == "cpu" and weight.dtype != torch.float32


def _sums(x: Tensor, weight: Tensor) -> Tensor:
    """[B, T, in] -> [B, T, out], summed in fp32, row by row."""
    wide = weight.float()
    rows = [(row.float() * wide).sum(-1) for row in x.flatten(0, 1).unbind()]
    return torch.stack(rows).to(x.dtype).view(*x.shape[:-1], -1)
