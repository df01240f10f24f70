"""The one communication of a tensor parallel layer: the shards' partial outputs become the output."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import StateError
from .plan import LayerInfo


def sum_of_shards(partial: Tensor, layer: LayerInfo) -> Tensor:
    """The sum over all shards of an output projection's partial output, in its own memory.

    In place of the all-reduce that transformers makes behind the same module. What stands in for a shard's dropped
    units is in its partial output; a bias is added behind the sum.

    Args:
        partial: [B, T, H], written to.
        layer: its `shards` are None while a shard is compared alone (`rewrite.verify`): then nothing is summed.

    Raises:
        StateError: gradients are wanted.
    """
    if layer.shards is None:
        return partial
    if torch.is_grad_enabled() and partial.requires_grad:
        raise StateError(
            "a tensor parallel model that is transformed passes no gradients; call it under torch.no_grad(), or train "
            "the model that pp_fx.restore(model) gives back"
        )
    dist.all_reduce(partial, group=layer.shards.group)
    return partial
