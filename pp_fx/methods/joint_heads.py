"""The joint head score: heads cancel in the output, so they are dropped as a set. For heads alone.

The error of dropping a set of heads is the sum of the Gram matrix of their outputs over it (`runtime.head_gram`).
Greedily the head that adds the least to it is dropped next (docs/research/recovery.md, sections 6 and 7).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import drop_jointly
from .score import SCORES, Score, Statistics


def _column(weight: Tensor) -> Tensor:
    """Not used: the Gram matrix holds the weights already."""
    return torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)


def _units(given: Statistics) -> Tensor:
    """0, 1, .. in the order in which heads are dropped, infinity for the kept ones."""
    return drop_jointly(given.gram, given.dropped, given.exports)  # type: ignore[arg-type]


joint = SCORES["joint"] = Score(_column, _units, gram=True)
