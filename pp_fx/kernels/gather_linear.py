"""Products with kept rows of a weight: `pp_fx::gather_linear` and `pp_fx::gather_output`.

On CUDA a Triton kernel reads the rows where they lie. A copy costs a fixed time, so the kernels are for calls of few
rows; `benchmarks/gpu.py` measures up to how many.

Elsewhere the rows are copied, used and freed inside the operator. Inductor gathers all weights of a block in one loop
before the first product, and large ones, alive together, are fresh memory at every call, which costs several times as
much as the copies themselves (`benchmarks/blocks.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    return x @ weight.index_select(0, kept).t()


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
    rows = weight.index_select(0, kept)
    return z @ (rows if correction is None else rows.add_(correction))


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

    return output(z, weight, kept) if correction is None else z @ weight.index_select(0, kept).add_(correction)
