"""The Triton kernels of `gather_linear`: the kept rows read in place.

The same tile serves both products; what differs is which dimension of the weight the indices select. Tiles are visited
in groups of rows, so that the part of the weight that they share stays in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """M rows x N results, K numbers of each sum at a time; pipeline stages and warps of a program."""

    m: int
    n: int
    k: int
    stages: int
    warps: int


TILES = ((16, Tile(16, 64, 256, 4, 4)), (32, Tile(32, 128, 128, 4, 4)), (64, Tile(64, 128, 64, 4, 4)),
         (512, Tile(128, 128, 64, 4, 8)))  # fmt: skip
"""Half precision, by up to how many rows of x; `LARGEST` above."""
LARGEST = Tile(128, 256, 64, 3, 8)
SINGLE = Tile(64, 64, 32, 3, 4)
"""Single precision: twice the memory a number, no tensor cores."""


@triton.jit
def _kernel(x, weight, kept, y, m_size, x_stride, w_stride, y_stride, n_size: tl.constexpr, k_size: tl.constexpr,
            BY_ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """y[m, n] = sum over k of x[m, k] * w, where w = weight[kept[n], k] (BY_ROWS) or weight[kept[k], n]."""
    rows_of_tiles, columns_of_tiles = tl.cdiv(m_size, M), tl.cdiv(n_size, N)
    program = tl.program_id(0)
    first = program // (GROUP * columns_of_tiles) * GROUP
    together = tl.minimum(rows_of_tiles - first, GROUP)
    m = (first + program % (GROUP * columns_of_tiles) % together) * M + tl.arange(0, M)
    n = program % (GROUP * columns_of_tiles) // together * N + tl.arange(0, N)
    k = tl.arange(0, K)
    total = tl.zeros((M, N), dtype=tl.float32)
    x_rows = x + (m % m_size)[:, None].to(tl.int64) * x_stride
    if BY_ROWS:
        rows = weight + tl.load(kept + n % n_size)[None, :] * w_stride
    for start in range(0, k_size, K):
        if k_size % K == 0:
            part = tl.load(x_rows + start + k[None, :])
        else:
            part = tl.load(x_rows + start + k[None, :], mask=start + k[None, :] < k_size, other=0.0)
        if BY_ROWS:
            if k_size % K == 0:
                w = tl.load(rows + start + k[:, None])
            else:
                w = tl.load(rows + start + k[:, None], mask=start + k[:, None] < k_size, other=0.0)
        else:
            picked = tl.load(kept + start + k, mask=start + k < k_size, other=0)
            w = tl.load(weight + picked[:, None] * w_stride + (n % n_size)[None, :])
        total = tl.dot(part, w, total, input_precision="ieee")
    tl.store(y + m[:, None].to(tl.int64) * y_stride + n[None, :], total.to(y.dtype.element_ty),
             mask=(m[:, None] < m_size) & (n[None, :] < n_size))  # fmt: skip


def tile(rows: int, dtype: torch.dtype) -> Tile:
    """The tile for so many rows of x."""
    if dtype == torch.float32:
        return SINGLE
    return next((found for most, found in TILES if rows <= most), LARGEST)


def _run(x: Tensor, weight: Tensor, kept: Tensor, results: int, by_rows: bool) -> Tensor:
    x, weight = x.contiguous(), weight if weight.stride(1) == 1 else weight.contiguous()
    y = x.new_empty(x.shape[0], results)
    if y.numel() == 0:
        return y
    m, n, k, stages, warps = tile(x.shape[0], x.dtype)
    grid = (triton.cdiv(x.shape[0], m) * triton.cdiv(results, n),)
    _kernel[grid](
        x, weight, kept, y, x.shape[0], x.stride(0), weight.stride(0), y.stride(0), n_size=results, k_size=x.shape[1],
        BY_ROWS=by_rows, M=m, N=n, K=k, GROUP=8, num_stages=stages, num_warps=warps,
    )  # fmt: skip
    return y


def linear(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """x [M, H] @ weight[kept].T -> [M, k]."""
    return _run(x, weight, kept, kept.shape[0], True)


def output(z: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """z [M, k] @ weight[kept] -> [M, H]."""
    return _run(z, weight, kept, weight.shape[1], False)
