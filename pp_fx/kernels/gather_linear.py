"""Kept rows of a weight, and products with them: `pp_fx::gather_linear` and `pp_fx::gather_output`.

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


def kept_rows(weight: Tensor, kept: Tensor) -> Tensor:
    """weight[kept] in the memory layout of the weight.

    Args:
        weight: [C, H], its rows or (a CPU's output projection) its columns contiguous.
        kept: int64 [k], in [0, C).

    Returns:
        [k, H].
    """
    if weight.stride(-1) == 1 or torch.compiler.is_exporting():
        return weight.index_select(0, kept)
    lines = weight.t()
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and weight.requires_grad):
        return lines.index_select(1, kept).t()
    # torch's own index_select is slow along this axis, and halves are gathered twice as fast as integers
    whole = lines.view(torch.int16) if weight.element_size() == 2 else lines
    return whole.gather(1, kept.expand(lines.shape[0], -1)).view(weight.dtype).t()


@torch.library.custom_op("pp_fx::gather_linear", mutates_args=())
def gather_linear(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """x @ weight[kept].T.

    Args:
        x: [M, H], fp32, fp16 or bf16.
        weight: [C, H], of the same dtype.
        kept: int64 [k], in [0, C).

    Returns:
        [M, k] in x's dtype, summed in fp32.
    """
    pieces = kept.split(_piece(weight.shape[1], weight))
    return torch.cat([x @ kept_rows(weight.detach(), rows).t() for rows in pieces], 1)


@torch.library.custom_op("pp_fx::gather_output", mutates_args=())
def gather_output(z: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """z @ weight[kept].

    Args:
        z: [M, k], fp32, fp16 or bf16.
        weight: [C, H], of the same dtype (an output projection, transposed).
        kept: int64 [k], in [0, C).

    Returns:
        [M, H] in z's dtype, summed in fp32.
    """
    # pieces of the results: sums of pieces would round more often
    pieces = weight.detach().split(_piece(kept.shape[0], weight), 1)
    return torch.cat([z @ kept_rows(piece, kept) for piece in pieces], 1)


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
def _(z: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], weight.shape[1])


@gather_linear.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    from .triton_gather import linear

    return linear(x, weight, kept)


@gather_output.register_kernel("cuda")
def _(z: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    from .triton_gather import output

    return output(z, weight, kept)
