"""Sums of tensors whose first dimensions differ."""

from __future__ import annotations

from torch import Tensor


def add_padded(one: Tensor, other: Tensor) -> Tensor:
    """The sum of two tensors, the shorter one filled up with zeros along its first dimension."""
    if one.ndim == 0 or one.shape[0] == other.shape[0]:
        return one + other
    longer, shorter = (one, other) if one.shape[0] > other.shape[0] else (other, one)
    total = longer.clone()
    total[: shorter.shape[0]] += shorter
    return total
