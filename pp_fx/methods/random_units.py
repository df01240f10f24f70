"""Random: a fixed random choice, the same in every layer; a lower reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .method import PUBLISHED, Method
from .score import SCORES, Score, Statistics


def _column(weight: Tensor) -> Tensor:
    """Fixed random numbers."""
    return torch.rand(weight.shape[1], dtype=torch.float32, generator=torch.Generator().manual_seed(0)).to(
        weight.device
    )


def _units(given: Statistics) -> Tensor:
    """The first column's number."""
    return given.column[:, 0]


SCORES["random"] = Score(_column, _units)
random = Method(
    "random",
    "a fixed random choice",
    "https://arxiv.org/abs/2502.15618",
    {
        **PUBLISHED,
        "probe": None,
        "score": "random",
        "attention_score": None,
        "mlp_compensation": None,
        "attention_compensation": None,
    },
)
