"""Magnitude: the weights alone, a lower reference (structured form of Han et al., 2015,
https://arxiv.org/abs/1506.02626).
"""

from __future__ import annotations

from torch import Tensor

from .method import PUBLISHED, Method
from .score import SCORES, Score, Statistics, column_sum


def _column(weight: Tensor) -> Tensor:
    """Sum of W[:, j]^2."""
    return column_sum(weight, 2)


def _units(given: Statistics) -> Tensor:
    """Norm of the unit's columns of the output projection."""
    return given.column.sum(-1)


SCORES["magnitude"] = Score(_column, _units)
magnitude = Method(
    "magnitude",
    "norm of the output projection's columns",
    "https://arxiv.org/abs/1506.02626",
    {
        **PUBLISHED,
        "probe": None,
        "score": "magnitude",
        "attention_score": None,
        "mlp_compensation": None,
        "attention_compensation": None,
    },
)
