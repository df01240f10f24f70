"""A^-1 B of a symmetric positive definite matrix: `pp_fx::solve`, for which every runtime can bring its own kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def _cholesky(a: Tensor, b: Tensor) -> Tensor:
    # with eigenvalues of at least 1 the inverse loses nothing, and its product is faster than a solve of many columns
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(a).L) @ b


def _triangular(a: Tensor, b: Tensor) -> Tensor:
    """On CUDA: `cholesky_inverse` and `cholesky_solve` wait for the device to look at its error flag, this does not."""
    factor = torch.linalg.cholesky_ex(a).L
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(a), dtype=a.dtype, device=a.device), upper=False)
    return inverse.t() @ (inverse @ b)


_solve = torch.library.custom_op("pp_fx::solve", _cholesky, mutates_args=())
_solve.register_fake(lambda a, b: torch.empty_like(b))
SOLVE = torch.ops.pp_fx.solve.default
"""The operator, as a trace holds it."""


def solve(a: Tensor, b: Tensor, exports: bool = False) -> Tensor:
    """A^-1 B of a symmetric positive definite matrix; an operator of its own in an exported graph.

    Args:
        a: fp32 [n, n], its eigenvalues at least 1 (identity + Gram matrix).
        b: fp32 [n, m].
        exports: an exported graph is being traced.

    Returns:
        fp32 [n, m]; not finite where `a` is not.
    """
    if exports:
        return _solve(a, b)
    return _triangular(a, b) if a.is_cuda else _cholesky(a, b)
