"""Who spreads a method's ratios over the layers before the model is transformed, by name (`Method.planner`).

Adding one: write a function (untransformed model, configuration, calibration batches) -> configuration with a ratio for
every layer, put it into `PLANNERS`, and its name into `pp_fx.methods.method.Planner`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..calibration.calibrate import calibrate
from ..config import LARGEST_RATIO, ProbePruningConfig
from ..methods import METHODS
from ..rewrite.layer import layers_of
from ..rewrite.transform import restore, transform
from ..runtime.select import history_scores
from .macs import unit_macs


def plan_ratios(name: str, model: nn.Module, config: ProbePruningConfig, batches: Any) -> ProbePruningConfig:
    """The configuration of a method, with a ratio for every layer where the method plans them.

    Args:
        name: of the method.
        model: untransformed; it is transformed while this runs and restored.
        config: of the method.
        batches: int64 [M, T], calibration text.
    """
    planner = METHODS[name].planner
    if planner is None:
        return config
    return (planner if callable(planner) else PLANNERS[planner])(model, config, batches)


def one_threshold(model: nn.Module, config: ProbePruningConfig, batches: Any) -> ProbePruningConfig:
    """Ratios from one threshold over the standardized scores of all layers, a unit weighed by its MACs (FLAP)."""
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


PLANNERS: dict[str, Callable[[nn.Module, ProbePruningConfig, Any], ProbePruningConfig]] = {
    "one_threshold": one_threshold,
}
