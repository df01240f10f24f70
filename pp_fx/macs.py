"""Multiply-accumulates of the decoder blocks' linear layers, dense and pruned, probe counted apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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


def count_macs(model: nn.Module, batch: int, length: int) -> Macs:
    """MACs per token of a transformed model for prefill of `batch` x `length` tokens; attention cores left out.

    Raises:
        StateError: the model is not transformed.
    """
    dense = pruned = probe = 0.0
    for layer in layers_of(model):
        weights = {n: p for n, p in layer.named_parameters() if p.ndim == 2}
        whole = sum(p.numel() for p in weights.values())
        dense += whole
        pruned += whole
        for kind, group in layer.groups.items():
            state: Any = layer.states()[kind]
            if not state.prunes:
                continue
            coupled = [*(str(p.weight.target) for p in group.inputs), layer.outputs[kind]]
            size = sum(weights[name].numel() for name in coupled)
            pruned -= size * (1 - state.kept_units / state.units)
            settings = state.config.probe
            rows = settings.samples(batch) * settings.positions(length)
            read = {*group.inputs, *getattr(group, "key_value", ())}
            probe += rows / (batch * length) * sum(weights[str(p.weight.target)].numel() for p in read)
    return Macs(dense, pruned, probe)


def kept_per_layer(model: nn.Module) -> list[dict[str, int]]:
    """For every layer the number of kept MLP channels ("mlp") and query heads ("heads"), whole ones included."""
    names = {"mlp": "mlp", "attention": "heads"}
    return [{names[kind]: s.kept_units for kind, s in layer.states().items()} for layer in layers_of(model)]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters (shared ones once)."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def state_bytes(model: nn.Module) -> int:
    """Bytes that the transformed model holds beyond its parameters: histories and column norms."""
    tensors = [b for layer in layers_of(model) for s in layer.states().values() for b in s.buffers()]
    return sum(b.numel() * b.element_size() for b in tensors if isinstance(b, torch.Tensor))
