"""FLAP: how much a channel fluctuates, ratios by one threshold for all layers, bias compensation; static
(An et al., AAAI 2024, https://arxiv.org/abs/2312.11983).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LARGEST_RATIO, ProbePruningConfig
from .method import Method
from .score import SCORES, Score, Statistics, column_sum


def _column(weight: Tensor) -> Tensor:
    """Sum of W[:, j]^2."""
    return column_sum(weight, 2)


def _units(given: Statistics) -> Tensor:
    """Variance of z_j times the sum of W[:, j]^2; of a head the mean over its columns."""
    return ((given.energy - given.mean.square()).clamp(min=0) * given.column).mean(-1)


def _plan(model: nn.Module, config: ProbePruningConfig, batches: Any) -> ProbePruningConfig:
    """Ratios from one threshold over the standardized scores of all layers, a unit weighed by its MACs."""
    from ..calibrate import calibrate
    from ..macs import unit_macs
    from ..selection import history_scores
    from ..transform import layers_of, restore, transform

    transform(model, config)
    try:
        calibrate(model, batches)
        layers = layers_of(model)
        groups = [(i, kind, s) for i, layer in enumerate(layers) for kind, s in layer.states().items() if s.prunes]
        scores = [history_scores(state) for _, _, state in groups]
        costs = [unit_macs(layers[i], layers[i].groups[kind]) for i, kind, _ in groups]
        budget = sum(cost * (s.units - s.kept_units) for cost, (_, _, s) in zip(costs, groups, strict=True))
    finally:
        restore(model)
    if not groups:
        return config
    score = torch.cat([(s - s.mean()) / s.std() for s in scores])
    cost = torch.cat([torch.full_like(s, c) for s, c in zip(scores, costs, strict=True)])
    order = score.argsort()
    dropped = torch.zeros_like(score)
    dropped[order[cost[order].cumsum(0) <= budget]] = 1
    ratios = {"mlp": [0.0] * len(layers), "attention": [0.0] * len(layers)}
    for (i, kind, _), part in zip(groups, dropped.split([len(s) for s in scores]), strict=True):
        ratios[kind][i] = min(part.mean().item(), LARGEST_RATIO)
    return dataclasses.replace(config, mlp_ratio=tuple(ratios["mlp"]), attention_ratio=tuple(ratios["attention"]))


SCORES["flap"] = Score(_column, _units)
flap = Method(
    "flap",
    "fluctuation, one threshold for all layers, bias compensation, chosen at calibration",
    "https://arxiv.org/abs/2312.11983",
    {
        "probe": None,
        "score": "flap",
        "attention_score": None,
        "mlp_compensation": "mean",
        "attention_compensation": "mean",
    },
    _plan,
)
