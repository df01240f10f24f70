"""The Triton kernels of `gather_linear`: tiles of M rows x 64 results, the kept rows read in place.

The same tile serves both products; what differs is which dimension of the weight the indices select.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_N, _K = 64, 64


@triton.jit
def _kernel(x, weight, kept, y, m_size, n_size, k_size, x_stride, w_stride, y_stride,
            BY_ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """y[m, n] = sum over k of x[m, k] * w, where w = weight[kept[n], k] (BY_ROWS) or weight[kept[k], n]."""
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    total = tl.zeros((M, N), dtype=tl.float32)
    if BY_ROWS:
        rows = tl.load(kept + n, mask=n < n_size, other=0)
    for start in range(0, k_size, K):
        inside = start + k < k_size
        part = tl.load(x + m[:, None] * x_stride + start + k[None, :],
                       mask=(m[:, None] < m_size) & inside[None, :], other=0.0)  # fmt: skip
        if BY_ROWS:
            w = tl.load(weight + rows[None, :] * w_stride + start + k[:, None],
                        mask=inside[:, None] & (n[None, :] < n_size), other=0.0)  # fmt: skip
        else:
            rows = tl.load(kept + start + k, mask=inside, other=0)
            w = tl.load(weight + rows[:, None] * w_stride + n[None, :],
                        mask=inside[:, None] & (n[None, :] < n_size), other=0.0)  # fmt: skip
        total += tl.dot(part, w, input_precision="ieee")
    tl.store(y + m[:, None] * y_stride + n[None, :], total.to(y.dtype.element_ty),
             mask=(m[:, None] < m_size) & (n[None, :] < n_size))  # fmt: skip


def _run(x: Tensor, weight: Tensor, kept: Tensor, results: int, by_rows: bool) -> Tensor:
    x, weight = x.contiguous(), weight if weight.stride(1) == 1 else weight.contiguous()
    y = x.new_empty(x.shape[0], results)
    if y.numel() == 0:
        return y
    tile = 16 if x.shape[0] <= 16 else 32 if x.shape[0] <= 32 else 64
    grid = (triton.cdiv(x.shape[0], tile), triton.cdiv(results, _N))
    _kernel[grid](
        x, weight, kept, y, x.shape[0], results, x.shape[1], x.stride(0), weight.stride(0), y.stride(0),
        BY_ROWS=by_rows, M=tile, N=_N, K=_K,
    )  # fmt: skip
    return y


def linear(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """x [M, H] @ weight[kept].T -> [M, k]."""
    return _run(x, weight, kept, kept.shape[0], True)


def output(z: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """z [M, k] @ weight[kept] -> [M, H]."""
    return _run(z, weight, kept, weight.shape[1], False)
