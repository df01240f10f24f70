"""Wanda-sp: Wanda's score made structured, static (An et al., AAAI 2024, https://arxiv.org/abs/2312.11983).

Wanda itself: Sun et al., ICLR 2024, https://arxiv.org/abs/2306.11695.
"""

from __future__ import annotations

from torch import Tensor

from .method import PUBLISHED, Method
from .score import SCORES, Score, Statistics, column_sum


def _column(weight: Tensor) -> Tensor:
    """Sum of |W[:, j]|."""
    return column_sum(weight, 1)


def _units(given: Statistics) -> Tensor:
    """Sum of |W[:, j]| * ||z_j||_2 over the unit's columns."""
    return (given.energy.sqrt() * given.column).sum(-1)


SCORES["wanda_sp"] = Score(_column, _units)
wanda_sp = Method(
    "wanda_sp",
    "weight times activation norm, chosen at calibration",
    "https://arxiv.org/abs/2312.11983",
    {
        **PUBLISHED,
        "probe": None,
        "score": "wanda_sp",
        "attention_score": None,
        "mlp_compensation": None,
        "attention_compensation": None,
    },
)
