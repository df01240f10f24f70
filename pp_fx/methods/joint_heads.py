"""The joint head score: heads cancel in the output, so they are dropped as a set. For heads alone.

The error of dropping a set of heads is the sum of the Gram matrix of their outputs over it (`pp_fx.gram`). Greedily the
head that adds the least to it is dropped next (docs/research/recovery.md, sections 6 and 7).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .score import SCORES, Score, Statistics


def _column(weight: Tensor) -> Tensor:
    """Not used: the Gram matrix holds the weights already."""
    return torch.ones(weight.shape[1], device=weight.device)


def _units(given: Statistics) -> Tensor:
    """0, 1, .. in the order in which heads are dropped, infinity for the kept ones."""
    gram: Tensor = given.gram  # type: ignore[assignment]
    cost, added = gram.diagonal(), torch.zeros_like(gram[0])
    score = torch.full_like(cost, torch.inf)
    for step in range(given.dropped):
        head = torch.where(score.isinf(), cost + 2 * added, torch.inf).argmin()
        score = score.index_fill(0, head, step)
        added = added + gram.index_select(0, head[None])[0]
    return score


SCORES["joint"] = Score(_column, _units, gram=True)
