"""Multiply-accumulates of the decoder blocks' linear layers, dense and pruned, probe counted apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import ProbeConfig
from .groups import Group
from .state import states_of
from .transform import layers_of


@dataclass(frozen=True)
class Macs:
    """MACs per token of all decoder blocks.

    Attributes:
        dense: every linear layer of every block, whole.
        pruned: the kept rows and columns, without the probe.
        probe: the probe's share, for the batch and length it was counted for.
    """

    dense: float
    pruned: float
    probe: float

    @property
    def ideal(self) -> float:
        """pruned / dense."""
        return self.pruned / self.dense

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.dense + other.dense, self.pruned + other.pruned, self.probe + other.probe)


def count_macs(model: nn.Module, batch: int, length: int) -> Macs:
    """MACs per token of a transformed model for prefill of `batch` x `length` tokens; attention cores left out.

    Raises:
        StateError: the model is not transformed.
    """
    layers = layers_of(model)
    kept = [{kind: s.kept_units for kind, s in layer.states().items()} for layer in layers]
    settings = next((s.config.probe for s in states_of(model)), ProbeConfig())
    parts = [layer_macs(a, a.groups, k, settings, batch, length) for a, k in zip(layers, kept, strict=True)]
    return sum(parts, Macs(0.0, 0.0, 0.0))


def layer_macs(
    layer: nn.Module, groups: dict[str, Group], kept: dict[str, int], settings: ProbeConfig, batch: int, length: int
) -> Macs:
    """MACs per token of one layer of which `kept[kind]` units of every group run."""
    weights = {n: _macs(layer, p) for n, p in layer.named_parameters() if p.ndim in (2, 3)}
    dense = pruned = float(sum(weights.values()))
    probe = 0.0
    share = settings.samples(batch) * settings.positions(length) / (batch * length)
    for kind, group in groups.items():
        if kept[kind] < group.units:
            pruned -= sum(weights[path] * (1 - group.kept_share(path, kept[kind])) for path in group.weights)
            probe += share * sum(weights[path] for path in {p.path for p in group.read})
    return Macs(dense, pruned, probe)


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


def kept_head_share(model: nn.Module) -> float:
    """Kept query heads / all query heads, over all layers; 1.0 where attention is dense."""
    states = [layer.states().get("attention") for layer in layers_of(model)]
    heads = [(s.kept_units, s.units) for s in states if s is not None]
    return sum(k for k, _ in heads) / sum(n for _, n in heads) if heads else 1.0


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_core_macs(config: Any, length: int) -> float:
    """MACs per token of scores and weighted values under a causal mask, all layers and heads."""
    return config.num_hidden_layers * config.num_attention_heads * _head_size(config) * (length + 1)


def key_value_bytes(config: Any, batch: int, length: float, element: int) -> float:
    """Bytes of the KV cache that one decode step reads, all layers; `element` bytes a number."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * batch * length * heads * _head_size(config) * element


def head_weight(model: Any) -> nn.Parameter:
    """Weight of the LM head [V, H]."""
    return model.get_output_embeddings().weight


def block_bytes(model: nn.Module) -> tuple[int, float]:
    """Bytes of the decoder blocks' parameters that a decode step reads: dense, and with the kept rows alone."""
    dense, pruned = 0, 0.0
    for layer in layers_of(model):
        sizes = {n: p.numel() * p.element_size() for n, p in layer.named_parameters()}
        dense += sum(sizes.values())
        pruned += sum(sizes.values())
        for kind, group in layer.groups.items():
            state: Any = layer.states()[kind]
            pruned -= sum(sizes[path] * (1 - group.kept_share(path, state.kept_units)) for path in group.weights)
    return dense, pruned


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters (shared ones once)."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def state_bytes(model: nn.Module) -> int:
    """Bytes that the transformed model holds beyond its parameters: histories and column norms."""
    tensors = [b for layer in layers_of(model) for s in layer.states().values() for b in s.buffers()]
    return sum(b.numel() * b.element_size() for b in tensors if isinstance(b, torch.Tensor))
