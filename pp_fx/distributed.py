"""Data parallel work under torch.distributed (torchrun, accelerate): every process has the whole model, and its share.

Statistics are merged as sums, not as averages of averages, so the ranks end with one history: that of all batches.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError
from .padding import add_padded
from .sketch import Sketch
from .state import GroupState


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


def gather(value: Any) -> list[Any]:
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
    found = gather(None if error is None else str(error))
    if error is not None:
        raise error
    other = next(((rank, text) for rank, text in enumerate(found) if text is not None), None)
    if other is not None:
        raise InputError(f"rank {other[0]} failed: {other[1]}")


def merge_statistics(states: list[GroupState]) -> None:
    """Give the states of `calibrate` on all ranks the sums and sketches of all of them."""
    if world()[1] == 1:
        return
    for state in states:
        device = state.column.device
        mine = {key: value.cpu() for key, value in state.sums.items()}
        parts = gather((mine, None if state.sketch is None else state.sketch.parts()))
        sums: dict[str, Tensor] = {}
        for part, _ in parts:
            for key, value in part.items():
                sums[key] = value if key not in sums else add_padded(sums[key], value)
        state.sums = {key: value.to(device) for key, value in sums.items()}
        if state.sketch is not None:
            merged = Sketch(state.sketch.rank)
            for _, sketch in parts:
                merged.merge(sketch, device)
            state.sketch = merged
