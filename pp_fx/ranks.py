"""Processes that work together under torch.distributed (torchrun, accelerate).

Data parallel: every process has the whole model, and its share of the batches. Collected are merged as sums, not as
averages of averages, so the ranks end with one history: that of all batches. Tensor parallel (`pp_fx.shards`): every
process has its share of the model, and all batches.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from . import errors
from .errors import InputError


def world() -> tuple[int, int]:
    """Rank and number of the processes that work together; (0, 1) for one alone."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def sharing(model: Any) -> tuple[int, int]:
    """Rank and number of the processes that share the batches: `world`; (0, 1) of a tensor parallel model.

    Args:
        model: any model; transformers' `tp_size` says into how many processes it was split.
    """
    return (0, 1) if (getattr(model, "tp_size", None) or 1) > 1 else world()


def everyone() -> Any:
    """The process group of `world`; None for one process alone."""
    return dist.group.WORLD if world()[1] > 1 else None


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


def of_all(value: Any, group: Any = None) -> list[Any]:
    """The value of every rank (of a process group; None: of all), in the order of the ranks."""
    size = world()[1] if group is None else dist.get_world_size(group)
    if size == 1:
        return [value]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, value, group=group)
    return found


def agree(error: Exception | None, group: Any = None) -> None:
    """Raise on all ranks what any of them met, so that none waits for one that has stopped.

    Raises:
        Exception: this rank's own.
        PpFxError: another rank's: of its class, or InputError where that is none of pp_fx's.
    """
    found = of_all(None if error is None else (type(error).__name__, str(error)), group)
    if error is not None:
        raise error
    for rank, other in enumerate(found):
        if other is not None:
            name, text = other
            raise vars(errors).get(name, InputError)(f"rank {rank} failed: {text}")


@contextlib.contextmanager
def agreed(group: Any) -> Iterator[None]:
    """What one rank of a process group raises inside, all raise at the end; without a group nothing changes.

    What runs inside must not communicate: a rank that has failed would be waited for.
    """
    if group is None:
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    agree(failed, group)
