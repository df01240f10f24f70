"""Kept rows of a weight, and products with them: `pp_fx::gather_linear` and `pp_fx::gather_output`.

On CUDA a Triton kernel reads the rows where they lie. A copy costs a fixed time, so the kernels are for calls of few
rows; `benchmarks/gpu.py` measures up to how many.

Elsewhere the rows are copied; a native kernel multiplies some dozens of rows of bf16 with rows in place. Inductor
gathers all weights of a block in one loop before the first product, and large copies are fresh memory at every call,
which costs several times as much as the copying itself (docs/research/speed.md, section 4). So on a CPU the operators
copy into a workspace, one for each thread, which grows to the largest copy and stays.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from ..layouts import is_plain, take_rows
from .kept_columns import copy_columns, kept_columns
from .native_kernels import native

_MOST_ROWS = 96
"""Of bf16, for which the native kernel beats a copy and oneDNN's product (docs/research/speed.md, section 8)."""
_LARGE = 4 * 2**20
"""Bytes of a copy from which on the allocator asks the system for fresh memory at every call."""


class _Workspace(threading.local):
    memory: Tensor | None = None

    def take(self, size: int) -> Tensor:
        """Uint8 [size], overwritten by the next call."""
        if self.memory is None or self.memory.numel() < size:
            with torch.inference_mode(False):  # else it could not be written to outside of it
                self.memory = torch.empty(size, dtype=torch.uint8)
        return self.memory[:size]


_workspace = _Workspace()


def kept_rows(weight: Tensor, kept: Tensor, exports: bool = False, out: Tensor | None = None) -> Tensor:
    """weight[kept] in the memory layout of the weight.

    Args:
        weight: [C, H], its rows or (a CPU's output projection) its columns contiguous; or quantized (`pp_fx.layouts`).
        kept: int64 [k], in [0, C).
        exports: an exported graph is being traced.
        out: memory [k, H] to write to, of an uncompiled call without gradients.

    Returns:
        [k, H].
    """
    if not is_plain(weight):
        return take_rows(weight, kept)
    if out is not None:
        return torch.index_select(weight, 0, kept, out=out)
    if exports:
        return weight.index_select(0, kept)
    learns = torch.is_grad_enabled() and weight.requires_grad
    if weight.stride(-1) != 1 and (learns or weight.device.type != "cpu"):
        return weight.t().index_select(1, kept).t()
    return _copy(weight, kept, None)


def _copy(weight: Tensor, kept: Tensor, memory: Tensor | None) -> Tensor:
    """As `kept_rows`, in the memory given (uint8), or in new memory."""
    rows = weight.stride(-1) == 1
    if memory is None:
        return weight.index_select(0, kept) if rows else kept_columns(weight.t(), kept).t()
    memory = memory.view(weight.dtype)
    if rows:
        return torch.index_select(weight, 0, kept, out=memory.view(kept.shape[0], weight.shape[1]))
    return copy_columns(weight.t(), kept, memory.view(weight.shape[1], kept.shape[0])).t()


def _work(weight: Tensor, kept: Tensor) -> Tensor:
    """As `kept_rows`, on a CPU in the workspace."""
    size = kept.shape[0] * weight.shape[1] * weight.element_size()
    return _copy(weight.detach(), kept, _workspace.take(size) if weight.device.type == "cpu" else None)


def _in_place(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor | None:
    """`gather_linear` by the native kernel; None where that is slower, or is not there."""
    plain = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu" and weight.stride(1) == 1
    library: Any = native() if plain and 0 < x.shape[0] <= _MOST_ROWS else None
    if library is None:
        return None
    x, kept, y = x.contiguous(), kept.contiguous(), x.new_empty(x.shape[0], kept.shape[0])
    failed = library.pp_fx_kept_rows_linear(
        weight.data_ptr(),
        weight.stride(0),
        kept.data_ptr(),
        kept.shape[0],
        x.data_ptr(),
        y.data_ptr(),
        *x.shape,
        torch.get_num_threads(),
    )
    return None if failed else y


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
    made = _in_place(x, weight, kept)
    return x @ _work(weight, kept).t() if made is None else made


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
    return z @ _work(weight, kept)


def large(weight: Tensor, kept: Tensor) -> bool:
    """Whether a copy of these rows of a weight [C, H] needs the workspace: on a CPU, where it is large."""
    size = kept.shape[0] * weight.shape[1] * weight.element_size()
    return weight.device.type == "cpu" and size >= _LARGE


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
