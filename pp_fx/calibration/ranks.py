"""Data parallel work under torch.distributed (torchrun, accelerate): every process has the whole model, and its share.

Collected are merged as sums, not as averages of averages, so the ranks end with one history: that of all batches.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError


def world() -> tuple[int, int]:
    """Rank and number of the processes that work together; (0, 1) for one alone."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def processes() -> Iterator[int]:
    """Join the processes that `torchrun` has started, if it has; gives this one's rank.

    Uses gloo, or nccl where there is a CUDA device for every process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield world()[0]
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def of_all(value: Any) -> list[Any]:
    """The value of every rank, in the order of the ranks."""
    _, size = world()
    if size == 1:
        return [value]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, value)
    return found


def agree(error: Exception | None) -> None:
    """Raise on all ranks what any of them met, so that none waits for one that has stopped.

    Raises:
        Exception: this rank's own.
        InputError: another rank's.
    """
    found = of_all(None if error is None else str(error))
    if error is not None:
        raise error
    other = next(((rank, text) for rank, text in enumerate(found) if text is not None), None)
    if other is not None:
        raise InputError(f"rank {other[0]} failed: {other[1]}")
