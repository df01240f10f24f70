"""What stands in for the dropped channels, by registry name.

Adding one: write a function (output weight [H, C], Known, ridge) -> Compensation, put it into `COMPENSATIONS`, and its
name into `CompensationName`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..layouts import is_plain, take_columns, unrounded, widened

CompensationName = Literal["mean", "least_squares"]

_PROBE_SHARE = 0.5
"""Share of the probe's variance that counts as correlation; few rows know single variances better than their ties."""
_TINY = 1e-30


class Known(NamedTuple):
    """What is known of the intermediate state when a selection has been made; statistics are fp32.

    Attributes:
        kept: int64 [k], columns of the output projection.
        mean, variance: [C], of the history, or None without one.
        directions: [r, C], the history's principal directions: directions.T @ directions is their part of the
            covariance. None or zeros where there are none.
        rows: [n, C], the probe's rows, or None without a probe.
        real: bool [n], which of them count, or None for all.
        share: of the history against the probe, in [0, 1]; 0 while the history has seen nothing.
        exports: an exported graph is being traced.
    """

    kept: Tensor
    mean: Tensor | None
    variance: Tensor | None
    directions: Tensor | None
    rows: Tensor | None
    real: Tensor | None
    share: Tensor | float
    exports: bool = False


class Compensation(NamedTuple):
    """Attributes:

    vector: [H] in the weight's dtype, added to the branch's output.
    correction: what is added to the kept columns of the output projection, as factors [k, n] and [n, H] in the weight's
        dtype, or as [k, H] alone; None for nothing.
    """

    vector: Tensor
    correction: tuple[Tensor, ...] | None

    def dense_correction(self) -> Tensor | None:
        """[k, H], or None."""
        if self.correction is None:
            return None
        return self.correction[0] if len(self.correction) == 1 else self.correction[0] @ self.correction[1]

    def where(self, changed: Tensor, old: Compensation) -> Compensation:
        """This one where the bool scalar is true, else the old one; without a correction is with one of zeros."""
        vector = torch.where(changed, self.vector, old.vector)
        new, former = self.dense_correction(), old.dense_correction()
        if new is None and former is None:
            return Compensation(vector, None)
        zero = vector.new_zeros(())
        return Compensation(
            vector, (torch.where(changed, zero if new is None else new, zero if former is None else former),)
        )


def mean(weight: Tensor, known: Known, ridge: float) -> Compensation:
    """The dropped channels' mean output, W @ mu: mu is part history, part probe (FLAP's bias, made dynamic).

    Args:
        weight: output projection [H, C].
        ridge: not used.
    """
    dropped = _mean(known).index_fill(0, known.kept, 0).to(weight.dtype)
    # a matrix of one row goes to cuBLAS, of a vector the compiler makes a slow sum; and torchao wants a matrix
    if weight.is_cuda or not is_plain(weight):
        return Compensation(torch.nn.functional.linear(dropped[None], unrounded(weight))[0], None)
    return Compensation(torch.nn.functional.linear(dropped, weight), None)


def least_squares(weight: Tensor, known: Known, ridge: float) -> Compensation:
    """The dropped channels' output, predicted from the kept channels by affine least squares (ridge regression).

    With the covariance A = diag(d) + Z.T @ Z of rank n + diagonal, the kept channels S and the dropped P,
    X = A_SS^-1 @ A_SP @ W_P.T needs no C x C matrix (Woodbury identity):

        X = D^-1 Z_S.T (I + Z_S D^-1 Z_S.T)^-1 Z_P W_P.T,   D = d_S + ridge * mean(d_S),

    one n x n Cholesky solve and n * C * H multiply-accumulates. Output: W_S z + W_P mu_P + X.T (z - mu_S).

    Args:
        weight: output projection [H, C].
        ridge: share of the mean of d_S.
    """
    mu, dropped = _mean(known), _dropped(known, weight.shape[1])
    factor, diagonal = _covariance(known, mu)
    kept = diagonal.index_select(0, known.kept)
    scale = (kept + ridge * kept.mean()).clamp(min=_TINY).rsqrt()
    # the two wide products in bf16 where the weight is; fp16 could overflow
    dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    rows = torch.cat([factor, mu[None]]).index_select(1, dropped).to(dtype)
    if not is_plain(weight):
        products = (rows @ widened(take_columns(weight, dropped)).t().to(dtype)).float()
    elif weight.dtype == dtype and not known.exports and kernels.large(weight.t(), dropped):
        products = kernels.gather_output(rows, weight.t(), dropped).float()
    else:
        products = (rows @ kernels.kept_rows(weight.t(), dropped, known.exports).to(dtype)).float()
    # the last one: the dropped channels' mean output
    kept_factor = factor.index_select(1, known.kept) * scale
    gram = kept_factor @ kept_factor.t() + torch.eye(len(kept_factor), dtype=factor.dtype, device=weight.device)
    solved = kernels.solve(gram, products[:-1], known.exports)
    coefficients = (kept_factor * scale).t()
    at_mean = (mu.index_select(0, known.kept) @ coefficients) @ solved
    factors = (coefficients, solved) if dtype == weight.dtype else (coefficients @ solved,)
    return Compensation((products[-1] - at_mean).to(weight.dtype), tuple(f.to(weight.dtype) for f in factors))


def least_squares_or_mean(solves: Tensor, weight: Tensor, known: Known, ridge: float) -> Compensation:
    """`least_squares` where the bool scalar `solves` is true, else `mean`; for an exported graph, which serves both."""
    names = [name for name, value in known._asdict().items() if isinstance(value, Tensor)]
    constants: Any = {name: value for name, value in known._asdict().items() if name not in names}

    def least(weight: Tensor, *tensors: Any) -> tuple[Tensor, Tensor]:
        made = least_squares(weight, Known(**constants, **dict(zip(names, tensors, strict=True))), ridge)
        return made.vector, made.dense_correction()  # type: ignore[return-value]

    def plain(weight: Tensor, *tensors: Any) -> tuple[Tensor, Tensor]:
        given = Known(**constants, **dict(zip(names, tensors, strict=True)))
        return mean(weight, given, ridge).vector, weight.new_zeros(given.kept.shape[0], weight.shape[0])

    tensors = (getattr(known, name) for name in names)
    vector, correction = torch.cond(solves, least, plain, (weight, *tensors))
    return Compensation(vector, (correction,))


def _mean(known: Known) -> Tensor:
    """Mean of the intermediate state, part history, part probe: [C]."""
    if known.rows is None:
        return known.mean  # type: ignore[return-value]
    if known.real is None:
        probe = known.rows.mean(0)
    else:  # where, not a product: padded rows may hold Inf or NaN
        probe = torch.where(known.real[:, None], known.rows, 0.0).sum(0) / known.real.sum().clamp(min=1)
    return probe if known.mean is None else known.share * known.mean + (1 - known.share) * probe


def _dropped(known: Known, channels: int) -> Tensor:
    """The columns that are not kept, ascending: int64 [C - k]."""
    mask = torch.ones(channels, dtype=torch.float32, device=known.kept.device).index_fill(0, known.kept, 0)
    return kernels.top(mask, channels - known.kept.shape[0], known.exports)


def _row_weights(known: Known) -> Tensor:
    """[n], equal for the real rows, their sum 1."""
    rows: Tensor = known.rows  # type: ignore[assignment]
    if known.real is None:
        return rows.new_full((rows.shape[0],), 1 / rows.shape[0])
    return known.real.to(rows.dtype) / known.real.sum().clamp(min=1)


def _covariance(known: Known, mu: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance about `mu`, part history, part probe, as (Z [n, C], d [C]): diag(d) + Z.T @ Z."""
    parts, diagonal = [], torch.zeros_like(mu)
    share: Tensor | float = known.share if known.rows is not None else 1.0
    share = mu.new_ones(()) * share
    if known.mean is not None and known.variance is not None:
        spread = known.variance
        if known.directions is not None:
            directions = known.directions.float()
            spread = (spread - directions.square().sum(0)).clamp(min=0)
            parts.append(directions * share.sqrt())
        parts.append(((known.mean - mu) * share.sqrt())[None])
        diagonal = diagonal + share * spread
    if known.rows is not None:
        centred = (known.rows - mu) * ((1 - share) * _row_weights(known)).sqrt()[:, None]
        if known.real is not None:
            centred = torch.where(known.real[:, None], centred, 0.0)
        parts.append(centred * _PROBE_SHARE**0.5)
        diagonal = diagonal + (1 - _PROBE_SHARE) * centred.square().sum(0)
    return torch.cat(parts), diagonal


COMPENSATIONS: dict[CompensationName, Callable[[Tensor, Known, float], Compensation]] = {
    "mean": mean,
    "least_squares": least_squares,
}
