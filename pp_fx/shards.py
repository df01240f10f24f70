"""Tensor parallel models: every process holds a shard of the projections (torch's DTensor), as transformers cuts them.

Input projections are cut by row and output projections by column, so a process has channels and heads of its own, and
the outputs of all are summed. Pruning takes place inside a shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from .errors import StateError


class Shards(NamedTuple):
    """Which of the equal shards of a model a process holds.

    Attributes:
        rank, size: this process's shard, and how many there are.
        group: the process group whose ranks hold them.
    """

    rank: int
    size: int
    group: Any


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: of tensor parallelism, or of FSDP2."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """This process's part of a DTensor, in the same memory; any other tensor as it is."""
    found: Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return found


def held(tensor: Any) -> Tensor:
    """The tensor object that holds a parameter's numbers: to set its memory layout."""
    found: Tensor = tensor._local_tensor if is_distributed(tensor) else tensor
    return found


def local_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters` of what this process holds."""
    return ((name, local(parameter)) for name, parameter in module.named_parameters())


def check_whole(model: Any, name: str) -> None:
    """What copies a model, or times one process, is not for a tensor parallel model.

    Args:
        model: any.
        name: of the function that was called.

    Raises:
        StateError: the model is split into shards.
    """
    count = getattr(model, "tp_size", None) or 1
    if count > 1:
        raise StateError(
            f"tp_size={count}: {name} needs the whole model on one process; load it without tensor parallelism"
        )
