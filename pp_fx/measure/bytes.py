"""Bytes of weights, KV cache and state: what a decode step reads, and what pruning holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..groups.group import Group
from ..groups.projections import Projection
from ..layouts import stored_bytes
from ..rewrite.layer import layers_of, settings_of
from ..runtime.state import GroupState
from ..shards import local, local_parameters
from .macs import head_size, running_units


def key_value_bytes(config: Any, batch: int, length: float, element: int) -> float:
    """Bytes of the KV cache that one decode step reads, all layers; `element` bytes a number."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * batch * length * heads * head_size(config) * element


def head_weight(model: Any) -> nn.Parameter:
    """Weight of the LM head [V, H]."""
    return model.get_output_embeddings().weight


def block_bytes(model: nn.Module, tokens: int, batch: int = 1) -> tuple[int, float]:
    """Bytes of the decoder blocks' parameters that a decode step reads: dense, and with the kept rows alone.

    Args:
        model: transformed.
        tokens: of the prompt (B x T): what the guard kept dense there stays dense.
        batch: tokens of the step. With decode="step" each chooses for itself; that they do so independently is the
            most that can be read.
    """
    dense, pruned = 0, 0.0
    settings = settings_of(model)
    sticky = settings.decode != "dense" and not settings.steps
    few = settings.decode == "step" or batch <= (settings.step_batch or 0)
    for layer in layers_of(model):
        sizes = {n: stored_bytes(p) for n, p in local_parameters(layer)}
        dense += sum(sizes.values())
        pruned += sum(sizes.values())
        for kind, kept in running_units(layer, tokens, True).items() if sticky else ():
            group = layer.groups[kind]
            pruned -= sum(sizes[path] * (1 - group.kept_share(path, kept)) for path in group.weights)
        pruned -= sum(
            _left_out(layer.groups[kind], s, sizes, batch) for kind, s in layer.states().items() if s.steps and few
        )
    return dense, pruned


def _left_out(group: Group, state: GroupState, sizes: dict[str, int], batch: int) -> float:
    """Bytes that a decode step by token does not read: the gate, or all inputs of an MLP without one, run whole."""
    sparse: tuple[Projection, ...] = (group.output,) if state.factor is None else (group.inputs[0], group.output)
    copied = 0
    if state.coded is not None:  # the copy runs whole, and the gate as the others do
        sparse, copied = (*group.inputs, group.output), sum(t.numel() * t.element_size() for t in state.coded)
    return sum(sizes[p.path] * p.share for p in sparse) * (1 - state.step_units / state.units) ** batch - copied


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters (shared ones once) that this process holds."""
    return sum(stored_bytes(local(p)) for p in model.parameters())


def state_bytes(model: nn.Module) -> int:
    """Bytes that the transformed model holds beyond its parameters: histories and column norms."""
    tensors = [b for layer in layers_of(model) for s in layer.states().values() for b in s.buffers()]
    return sum(b.numel() * b.element_size() for b in tensors if isinstance(b, torch.Tensor))
