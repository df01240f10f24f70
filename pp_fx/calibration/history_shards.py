"""A group's history by shards of its units: how one is taken of the whole, and the whole put together.

What pairs units (`gram`, `directions`) is known within a shard alone: the whole of several has no terms between them.
A file holds the directions of its shards side by side, so that they come back as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .directions import principal


def whole_of(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a file holds of a group, of the histories of all shards (`GroupState.history`), in their order.

    Returns:
        energy and mean over all columns, gram with zeros between shards, directions side by side [r, C].
    """
    found: dict[str, Tensor] = {}
    for key, first in parts[0].items():
        tensors = [part[key] for part in parts]
        if key == "gram":
            found[key] = torch.block_diag(*tensors)
        else:
            found[key] = first if first.ndim == 0 else torch.cat(tensors, -1)
    return found


def shard_of(history: dict[str, Tensor], written: int, rank: int, count: int, directions: int) -> dict[str, Tensor]:
    """The history of one shard.

    Args:
        history: of a group, as a file holds it.
        written: how many shards wrote it.
        rank, count: the shard, and how many there are.
        directions: so many of them are wanted.

    Returns:
        By name; what does not divide is left whole.
    """
    if written == count == 1:
        return history
    found: dict[str, Tensor] = {}
    for key, tensor in history.items():
        if tensor.ndim == 0 or tensor.shape[-1] % count or tensor.shape[-1] % written:
            found[key] = tensor
        elif key == "gram":
            found[key] = _part(_part(tensor, rank, count).t(), rank, count).t()
        elif key == "directions":
            found[key] = _directions(history, written, rank, count, directions)
        else:
            found[key] = _part(tensor, rank, count)
    return found


def _part(tensor: Tensor, rank: int, count: int) -> Tensor:
    """One of the equal parts of the last axis."""
    return tensor.chunk(count, -1)[rank]


def _directions(history: dict[str, Tensor], written: int, rank: int, count: int, wanted: int) -> Tensor:
    """The principal directions [wanted, C / count] of what the directions of the shards that wrote say of this one."""
    side_by_side = history["directions"]
    stack = _part(torch.block_diag(*side_by_side.chunk(written, -1)), rank, count)
    stack = stack[stack.any(1)].float()
    if len(stack) > wanted:
        energy = history["energy"].mean(0) if history["energy"].ndim == 2 else history["energy"]
        variance = _part((energy - history["mean"].square()).clamp(min=0), rank, count)
        stack = principal(stack, variance, wanted)
    found = side_by_side.new_zeros(wanted, stack.shape[1])
    found[: len(stack)] = stack.to(found.dtype)
    return found
