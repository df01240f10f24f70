"""Multiply-accumulates of the decoder blocks' linear layers, dense and pruned; what is dynamic counted apart."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn

from .config import ProbePruningConfig
from .exported import LAYER
from .groups import Group
from .methods import SCORES
from .state import states_of
from .transform import layers_of


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

    Layers that the guard keeps dense at this size count as dense.

    Raises:
        StateError: the model is not transformed.
    """
    layers = layers_of(model)
    kept = [running_units(layer, batch * length) for layer in layers]
    config = next((s.config for s in states_of(model)), ProbePruningConfig())
    parts = [layer_macs(a, a.groups, k, config, batch, length) for a, k in zip(layers, kept, strict=True)]
    return sum(parts, Macs())


def running_units(layer: Any, tokens: int) -> dict[str, int]:
    """Group kind -> the units of a rewritten layer that run in a prefill of so many tokens (B x T)."""
    guarded = tokens < layer.__dict__[LAYER].guard_tokens
    return {kind: s.units if guarded else s.kept_units for kind, s in layer.states().items()}


def layer_macs(
    layer: nn.Module,
    groups: dict[str, Group],
    kept: dict[str, int],
    config: ProbePruningConfig,
    batch: int,
    length: int,
) -> Macs:
    """MACs per token of one layer of which `kept[kind]` units of every group run."""
    weights = {n: _macs(layer, p) for n, p in layer.named_parameters() if p.ndim in (2, 3)}
    dense = pruned = float(sum(weights.values()))
    probe = compensation = 0.0
    rows = 0 if config.probe is None else config.probe.samples(batch) * config.probe.positions(length)
    for kind, group in groups.items():
        if kept[kind] < group.units:
            pruned -= sum(weights[path] * (1 - group.kept_share(path, kept[kind])) for path in group.weights)
            probe += _probe_macs(group, weights, config, rows)
            compensation += _compensation_macs(
                group, weights[group.output.path], kept[kind], config, rows, batch * length
            )
    return Macs(dense, pruned, probe / (batch * length), compensation / (batch * length))


def unit_macs(layer: nn.Module, group: Group) -> float:
    """MACs per token that one unit of a group takes."""
    weights = dict(layer.named_parameters())
    return sum(_macs(layer, weights[path]) * (1 - group.kept_share(path, group.units - 1)) for path in group.weights)


def _probe_macs(group: Group, weights: dict[str, float], config: ProbePruningConfig, rows: int) -> float:
    """MACs of one batch for the probe of a group, its head score included."""
    queries = group.kind == "attention" and config.probe is not None and config.probe.attention == "queries"
    read = group.inputs if queries else group.read
    macs = rows * sum(weights[path] * (p.share if queries else 1) for path, p in {p.path: p for p in read}.items())
    if group.kind == "attention" and SCORES[config.attention_score or config.score].gram:
        output = weights[group.output.path]
        macs += min(rows, config.compensation_rows) * (output + group.units * output / group.width)
    return macs


def _compensation_macs(
    group: Group, weight: float, kept: int, config: ProbePruningConfig, rows: int, tokens: int
) -> float:
    """MACs of one batch for what stands in for the dropped units; `weight` is that of the output projection."""
    name = config.mlp_compensation if group.kind == "mlp" else config.attention_compensation
    if name is None:
        return 0.0
    if name != "least_squares" or tokens < (config.compensation_min_tokens or 0):
        return weight
    ranked = 0 if config.history is None else min(config.compensation_rank, group.units * group.width) + 1
    n = ranked + min(rows, config.compensation_rows)
    return weight * (1 + n) + n * n * (kept * group.width + weight / (group.units * group.width)) + n**3 / 3


def _macs(layer: nn.Module, weight: nn.Parameter) -> float:
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


def key_value_bytes(config: Any, batch: int, length: float, element: int) -> float:
    """Bytes of the KV cache that one decode step reads, all layers; `element` bytes a number."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * batch * length * heads * head_size(config) * element


def head_weight(model: Any) -> nn.Parameter:
    """Weight of the LM head [V, H]."""
    return model.get_output_embeddings().weight


def block_bytes(model: nn.Module, tokens: int) -> tuple[int, float]:
    """Bytes of the decoder blocks' parameters that a decode step reads: dense, and with the kept rows alone.

    Args:
        model: transformed.
        tokens: of the prompt (B x T): what the guard kept dense there stays dense.
    """
    dense, pruned = 0, 0.0
    config = next((s.config for s in states_of(model)), ProbePruningConfig())
    for layer in layers_of(model):
        sizes = {n: p.numel() * p.element_size() for n, p in layer.named_parameters()}
        dense += sum(sizes.values())
        pruned += sum(sizes.values())
        if config.decode == "dense":
            continue
        for kind, kept in running_units(layer, tokens).items():
            group = layer.groups[kind]
            pruned -= sum(sizes[path] * (1 - group.kept_share(path, kept)) for path in group.weights)
    return dense, pruned


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters (shared ones once)."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def state_bytes(model: nn.Module) -> int:
    """Bytes that the transformed model holds beyond its parameters: histories and column norms."""
    tensors = [b for layer in layers_of(model) for s in layer.states().values() for b in s.buffers()]
    return sum(b.numel() * b.element_size() for b in tensors if isinstance(b, torch.Tensor))
