"""FLAP: how much a channel fluctuates, ratios by one threshold for all layers, bias compensation; static
(An et al., AAAI 2024, https://arxiv.org/abs/2312.11983).
"""

from __future__ import annotations

from torch import Tensor

from .method import PUBLISHED, Method
from .score import SCORES, Score, Statistics, column_sum


def _column(weight: Tensor) -> Tensor:
    """Sum of W[:, j]^2."""
    return column_sum(weight, 2)


def _units(given: Statistics) -> Tensor:
    """Variance of z_j times the sum of W[:, j]^2; of a head the mean over its columns."""
    return ((given.energy - given.mean.square()).clamp(min=0) * given.column).mean(-1)


SCORES["flap"] = Score(_column, _units)
flap = Method(
    "flap",
    "fluctuation, one threshold for all layers, bias compensation, chosen at calibration",
    "https://arxiv.org/abs/2312.11983",
    {
        **PUBLISHED,
        "probe": None,
        "score": "flap",
        "attention_score": None,
        "mlp_compensation": "mean",
        "attention_compensation": "mean",
    },
    planner="one_threshold",
)
