"""Principal directions of a stream of rows, in bounded memory: incremental principal component analysis.

Channels count in units of their own standard deviation, so that few loud ones do not take all directions. Merging
means and truncated factors: Ross et al., "Incremental Learning for Robust Visual Tracking", IJCV 2008. Truncated
eigenvectors by subspace iteration: Halko et al., arXiv 0909.4061.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1024
"""At most so many rows of one batch."""
_SPARE = 2
"""The stream is kept at so many times the wanted rank, so that truncation between batches costs little."""
_ITERATIONS = 4


class Directions:
    """Takes batches of rows, gives their principal directions.

    Args:
        rank: wanted directions r.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.count = 0
        self.mean: Tensor | None = None
        self.variance: Tensor | None = None
        self.factor: Tensor | None = None

    def add(self, rows: Tensor, real: Tensor | None) -> None:
        """Take evenly spaced rows of a batch.

        Args:
            rows: [n, C].
            real: bool [n], which of them count, or None for all.
        """
        if real is not None:
            rows = rows[real]
        step = -(-rows.shape[0] // _ROWS) | 1  # odd: a power of two would meet the same positions of every sequence
        rows = rows[::step].float()
        count = rows.shape[0]
        if count == 0:
            return
        mean = rows.mean(0)
        centred = rows - mean
        self._join(count, mean, centred.square().mean(0), centred / count**0.5)

    def parts(self) -> tuple[int, Tensor, Tensor, Tensor] | None:
        """What `merge` takes: number of rows, mean, variance, factor; None before the first row."""
        if self.mean is None or self.variance is None or self.factor is None:
            return None
        return self.count, self.mean.cpu(), self.variance.cpu(), self.factor.cpu()

    def merge(self, parts: tuple[int, Tensor, Tensor, Tensor] | None, device: torch.device) -> None:
        """Take the rows that another one has seen, by its `parts`."""
        if parts is not None:
            count, *tensors = parts
            self._join(count, *(t.to(device) for t in tensors))

    def _join(self, count: int, mean: Tensor, variance: Tensor, factor: Tensor) -> None:
        """Rows of this mean and variance, whose covariance is factor.T @ factor."""
        if self.mean is None or self.variance is None or self.factor is None:
            self.mean, self.variance, stack = mean, variance, factor
        else:
            total = self.count + count
            old, new = self.count / total, count / total
            shift = (mean - self.mean) * (old * new) ** 0.5
            self.variance = old * self.variance + new * variance + shift.square()
            self.mean = old * self.mean + new * mean
            stack = torch.cat([self.factor * old**0.5, factor * new**0.5, shift[None]])
        self.count += count
        self.factor = principal(stack, self.variance, _SPARE * self.rank)

    def directions(self) -> Tensor | None:
        """fp32 [r, C]: directions.T @ directions is their part of the rows' covariance; None before the first row."""
        if self.factor is None or self.variance is None:
            return None
        return principal(self.factor, self.variance, self.rank)


def principal(stack: Tensor, variance: Tensor, rank: int) -> Tensor:
    """The leading directions of a covariance, channels scaled by their deviation (Halko et al., arXiv 0909.4061).

    Args:
        stack: fp32 [n, C], of the covariance stack.T @ stack.
        variance: [C], of each channel.
        rank: wanted directions.

    Returns:
        [min(n, rank), C].
    """
    count = stack.shape[0]
    if count <= rank:
        return stack
    scaled = stack / variance.sqrt().clamp(min=1e-12)
    gram = scaled @ scaled.t()
    basis = torch.randn(count, rank, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).to(stack.device)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(gram @ basis).Q
    values = torch.linalg.eigh(basis.t() @ gram @ basis)
    return (basis @ values.eigenvectors).t().flip(0) @ stack
