"""How wide the layers run: ratios, kept units, and how much of it decoding may hold as compact weights."""

from __future__ import annotations

import math
from typing import get_args

from torch import nn

from ..config import Kind, ProbePruningConfig
from ..groups.group import Group
from ..layouts import stored_bytes


def carried_ratios(config: ProbePruningConfig, layers: int) -> dict[Kind, list[float]]:
    """Group kind -> the ratio that each layer carries."""
    return {kind: config.layer_ratios(f"{kind}_ratio", layers) for kind in get_args(Kind)}


def on_device(config: ProbePruningConfig, model: nn.Module) -> ProbePruningConfig:
    """The configuration with the values that the model's device takes for what it leaves open."""
    return config.on(device_of(model))


def device_of(model: nn.Module) -> str:
    """The type of the device that a model's first parameter is on."""
    return next((p.device.type for p in model.parameters()), "cpu")


def kept_units(kind: Kind, units: int, ratio: float, config: ProbePruningConfig) -> int:
    """How many channels (rounded up to a multiple of `round_to`) or heads of a group run at a per-layer ratio."""
    kept = units - int(ratio * units)
    if kind == "mlp" and ratio > 0:
        multiple = config.round_to or 1
        kept = min(units, -(-kept // multiple) * multiple)
    return kept


def step_units(units: int, ratio: float) -> int:
    """How many of an MLP's channels each token of a decode step runs at a per-layer ratio."""
    return units - int(ratio * units)


def limit_compact(prepared: list[tuple], config: ProbePruningConfig) -> None:
    """Layers from the first on may hold compact weights while decoding, up to the configured limit."""
    left = math.inf if config.compact_megabytes is None else config.compact_megabytes * 2**20
    for layer, cls, states in prepared:
        for kind, state in states.items():
            size = _compact_size(layer, cls.groups[kind], state.kept_units)
            state.holds_compact = state.holds_compact and state.prunes and size <= left
            left -= size if state.holds_compact else 0


def _compact_size(layer: nn.Module, group: Group, kept: int) -> float:
    """Bytes of the compact weights: kept units of the pruned projections, and fused ones that run whole."""
    shares = [(p, p.share * kept / group.units) for p in (*group.inputs, group.output)]
    shares += [(p, p.share) for p in group.whole]
    weights = [(layer.get_parameter(p.path), share) for p, share in shares]
    return sum(stored_bytes(w) * share for w, share in weights)
