"""Multiply-accumulates of the decoder blocks' linear layers, dense and pruned; what is dynamic counted apart."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor, nn

from ..config import Kind, ProbePruningConfig
from ..groups.group import Group
from ..methods import SCORES
from ..rewrite.layer import layers_of, settings_of
from ..runtime.names import LAYER
from ..shards import local_parameters


@dataclass(frozen=True)
class Macs:
    """MACs per token of all decoder blocks.

    Attributes:
        dense: every linear layer of every block, whole.
        pruned: the kept rows and columns, without the probe.
        probe, compensation: what the probe and the dropped channels' compensation add, for the batch and length they
            were counted for.
    """

    dense: float = 0.0
    pruned: float = 0.0
    probe: float = 0.0
    compensation: float = 0.0

    @property
    def ideal(self) -> float:
        """pruned / dense."""
        return self.pruned / self.dense

    @property
    def overhead(self) -> float:
        """All that pruning adds: probe and compensation."""
        return self.probe + self.compensation

    @property
    def summary(self) -> str:
        """Shares of dense in words."""
        probe, compensation = self.probe / self.dense, self.compensation / self.dense
        return f"{self.ideal:.1%} + {probe:.1%} probe + {compensation:.1%} compensation"

    def __add__(self, other: Macs) -> Macs:
        return Macs(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def count_macs(model: nn.Module, batch: int, length: int) -> Macs:
    """MACs per token of a transformed model for prefill of `batch` x `length` tokens; attention cores left out.

    Layers that the guard keeps dense at this size count as dense. Of a tensor parallel model: those of this process.

    Raises:
        StateError: the model is not transformed.
    """
    layers = layers_of(model)
    kept = [running_units(layer, batch * length) for layer in layers]
    settings = settings_of(model)
    parts = [layer_macs(a, a.groups, k, settings, batch, length) for a, k in zip(layers, kept, strict=True)]
    return sum(parts, Macs())


def running_units(layer: Any, tokens: int, cached: bool = False) -> dict[Kind, int]:
    """Group kind -> the units of a rewritten layer that run in a prefill of so many tokens (B x T).

    `cached`: on a KV cache, with which the guard may judge otherwise.
    """
    guarded = layer.__dict__[LAYER].too_small(tokens, cached)
    return {kind: s.units if guarded else s.kept_units for kind, s in layer.states().items()}


def layer_macs(
    layer: nn.Module,
    groups: dict[Kind, Group],
    kept: dict[Kind, int],
    settings: ProbePruningConfig,
    batch: int,
    length: int,
) -> Macs:
    """MACs per token of one layer of which `kept[kind]` units of every group run."""
    weights = {n: _macs(layer, p) for n, p in local_parameters(layer) if p.ndim in (2, 3)}
    dense = pruned = float(sum(weights.values()))
    probe = compensation = 0.0
    rows = 0 if settings.probe is None else settings.probe.samples(batch) * settings.probe.positions(length)
    for kind, group in groups.items():
        if kept[kind] < group.units:
            pruned -= sum(weights[path] * (1 - group.kept_share(path, kept[kind])) for path in group.weights)
            probe += _probe_macs(group, weights, settings, rows)
            compensation += _compensation_macs(
                group, weights[group.output.path], kept[kind], settings, rows, batch * length
            )
    return Macs(dense, pruned, probe / (batch * length), compensation / (batch * length))


def unit_macs(layer: nn.Module, group: Group) -> float:
    """MACs per token that one unit of a group takes."""
    weights = dict(local_parameters(layer))
    return sum(_macs(layer, weights[path]) * (1 - group.kept_share(path, group.units - 1)) for path in group.weights)


def _probe_macs(group: Group, weights: dict[str, float], settings: ProbePruningConfig, rows: int) -> float:
    """MACs of one batch for the probe of a group, its head score included."""
    queries = group.kind == "attention" and settings.probe is not None and settings.probe.attention == "queries"
    read = group.inputs if queries else group.read
    macs = rows * sum(weights[path] * (p.share if queries else 1) for path, p in {p.path: p for p in read}.items())
    if group.kind == "attention" and SCORES[settings.of_kind(group.kind).score].gram:
        output = weights[group.output.path]
        macs += min(rows, settings.compensation_rows) * (output + group.units * output / group.width)
    return macs


def _compensation_macs(
    group: Group, weight: float, kept: int, settings: ProbePruningConfig, rows: int, tokens: int
) -> float:
    """MACs of one batch for what stands in for the dropped units; `weight` is that of the output projection."""
    name = settings.of_kind(group.kind).compensation
    if name is None:
        return 0.0
    if name != "least_squares" or tokens < (settings.compensation_min_tokens or 0):
        return weight
    ranked = 0 if settings.history is None else min(settings.compensation_rank, group.units * group.width) + 1
    n = ranked + min(rows, settings.compensation_rows)
    return weight * (1 + n) + n * n * (kept * group.width + weight / (group.units * group.width)) + n**3 / 3


def _macs(layer: nn.Module, weight: Tensor) -> float:
    """MACs per token of a weight [out, in], or of stacked experts [E, ., .] of which each token runs some."""
    if weight.ndim == 2:
        return weight.numel()
    configs: Any = (m.config for m in layer.modules() if hasattr(m, "config"))
    active = next((c.num_experts_per_tok for c in configs if hasattr(c, "num_experts_per_tok")), weight.shape[0])
    return weight.numel() * active / weight.shape[0]


def kept_per_layer(model: nn.Module) -> list[dict[str, int]]:
    """For every layer the number of kept MLP channels ("mlp") and query heads ("heads"), whole ones included."""
    names = {"mlp": "mlp", "attention": "heads"}
    return [{names[kind]: s.kept_units for kind, s in layer.states().items()} for layer in layers_of(model)]


def kept_head_share(model: nn.Module, tokens: int) -> float:
    """Query heads that run in a prefill of so many tokens / all of them; 1.0 where attention is dense."""
    layers = [layer for layer in layers_of(model) if "attention" in layer.groups]
    kept = sum(running_units(layer, tokens)["attention"] for layer in layers)
    return kept / sum(layer.groups["attention"].units for layer in layers) if layers else 1.0


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_core_macs(config: Any, length: int) -> float:
    """MACs per token of scores and weighted values under a causal mask, all layers and heads."""
    return config.num_hidden_layers * config.num_attention_heads * head_size(config) * (length + 1)
