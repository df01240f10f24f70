"""GRIFFIN: the batch's own activations, every token's scaled to length one (Dong et al., 2024,
https://arxiv.org/abs/2404.01365). Decoding keeps the prompt's choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .method import PUBLISHED, Method
from .score import SCORES, Score, Statistics


def _column(weight: Tensor) -> Tensor:
    """The weights of the output projection play no part."""
    return torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)


def _units(given: Statistics) -> Tensor:
    """Energy of the unit."""
    return given.energy.sum(-1)


SCORES["griffin"] = Score(_column, _units, relative=True)
griffin = Method(
    "griffin",
    "relative activations of the whole prompt; it costs the whole input projections",
    "https://arxiv.org/abs/2404.01365",
    {
        **PUBLISHED,
        "probe": {"token_fraction": 1.0, "sample_fraction": 1.0},
        "history": None,
        "score": "griffin",
        "attention_score": None,
        "mlp_compensation": None,
        "attention_compensation": None,
    },
)
