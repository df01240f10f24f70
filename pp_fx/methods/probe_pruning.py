"""Probe Pruning (Le et al., ICLR 2025, https://arxiv.org/abs/2502.15618): our default, and the authors' settings."""

from __future__ import annotations

import torch
from torch import Tensor

from .method import PUBLISHED, Method
from .score import SCORES, Score, Statistics, column_sum


def _column(weight: Tensor) -> Tensor:
    """|| W[:, j]^2 ||_2."""
    return column_sum(weight, 4).sqrt()


def _units(given: Statistics) -> Tensor:
    """PPsp in closed form (section 3.2).

    The paper's || c_j * W[:, j]^2 ||_2 equals c_j * || W[:, j]^2 ||_2, because c_j >= 0 is one number per channel;
    a head's score is the Frobenius norm over its channels.
    """
    weighted = given.energy * given.column
    # a channel is its own norm; torch 2.11's compiler gives a norm over one number the wrong shape
    return weighted[:, 0] if weighted.shape[1] == 1 else torch.linalg.vector_norm(weighted, dim=-1)


SCORES["ppsp"] = Score(_column, _units)
_PAPER = "https://arxiv.org/abs/2502.15618"
default = Method(
    "default",
    "evenly spaced probe, history per channel, least-squares compensation, every decoded token for itself",
    _PAPER,
)
paper = Method(
    "paper",
    "the authors' settings (section 4, and their published code)",
    _PAPER,
    {
        **PUBLISHED,
        "ratio_digits": 2,
        "probe": {
            "token_fraction": 0.5,
            "sample_fraction": 0.05,
            "min_positions": 2,
            "first_position": "few",
            "attention": "rows",
            "ranking": "residual",
        },
        "history": "position",
        "fusion_epsilon": 1e-6,
        "mlp_compensation": None,
        "attention_score": None,
        "attention_compensation": None,
    },
)
full_batch = Method(
    "full_batch",
    "every row is its own probe (the paper's upper reference; it costs the whole input projections)",
    _PAPER,
    {
        **PUBLISHED,
        "probe": {"token_fraction": 1.0, "sample_fraction": 1.0},
        "history": None,
        "mlp_compensation": None,
        "attention_score": None,
        "attention_compensation": None,
    },
)
