"""Products with kept rows of a weight: `pp_fx::gather_linear` and `pp_fx::gather_output`.

On CUDA a Triton kernel reads the rows where they lie. A copy costs a fixed time, so the kernels are for calls of few
rows; `benchmarks/gpu.py` measures up to how many.

Elsewhere the rows are copied, used and freed piece by piece inside the operator. Inductor gathers all weights of a
block in one loop before the first product, and large copies are fresh memory at every call, which costs several times
as much as the copying itself (`benchmarks/blocks.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 4 * 2**20
"""Bytes: small enough that the allocator gives the same memory out again, and that the product finds it in a cache."""


@torch.library.custom_op("pp_fx::gather_linear", mutates_args=())
def gather_linear(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """x @ weight[kept].T.

    Args:
        x: [M, H], fp32, fp16 or bf16.
        weight: [C, H], of the same dtype, its rows contiguous.
        kept: int64 [k], in [0, C).

    Returns:
        [M, k] in x's dtype, summed in fp32.
    """
    pieces = kept.split(_piece(weight.shape[1], weight))
    return torch.cat([x @ weight.index_select(0, rows).t() for rows in pieces], 1)


@torch.library.custom_op("pp_fx::gather_output", mutates_args=())
def gather_output(z: Tensor, weight: Tensor, kept: Tensor, correction: Tensor | None = None) -> Tensor:
    """z @ (weight[kept] + correction).

    Args:
        z: [M, k], fp32, fp16 or bf16.
        weight: [C, H], of the same dtype, its rows contiguous (an output projection stored transposed).
        kept: int64 [k], in [0, C).
        correction: [k, H], of the same dtype, or None.

    Returns:
        [M, H] in z's dtype, summed in fp32.
    """
    return _output(z, weight, kept, correction)


def _output(z: Tensor, weight: Tensor, kept: Tensor, correction: Tensor | None) -> Tensor:
    size, out = _piece(kept.shape[0], weight), []
    for start in range(0, weight.shape[1], size):  # pieces of the results: sums of pieces would round more often
        rows = weight[:, start : start + size].index_select(0, kept)
        out.append(z @ (rows if correction is None else rows.add_(correction[:, start : start + size])))
    return torch.cat(out, 1)


def large(weight: Tensor, kept: Tensor) -> bool:
    """Whether copies of these rows of a weight [C, H] are made piece by piece: on a CPU, not in an exported graph."""
    size = kept.shape[0] * weight.shape[1] * weight.element_size()
    return weight.device.type == "cpu" and not torch.compiler.is_exporting() and size >= _PIECE


def _piece(length: int, weight: Tensor) -> int:
    """Of lines of `length` elements, as many as are copied at a time."""
    return max(1, _PIECE // max(1, length * weight.element_size()))


@gather_linear.register_fake
def _(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], kept.shape[0])


@gather_output.register_fake
def _(z: Tensor, weight: Tensor, kept: Tensor, correction: Tensor | None = None) -> Tensor:
    return z.new_empty(z.shape[0], weight.shape[1])


@gather_linear.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    from .triton_gather import linear

    return linear(x, weight, kept)


@gather_output.register_kernel("cuda")
def _(z: Tensor, weight: Tensor, kept: Tensor, correction: Tensor | None = None) -> Tensor:
    from .triton_gather import output

    return output(z, weight, kept) if correction is None else _output(z, weight, kept, correction)
