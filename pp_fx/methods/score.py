"""What a score is. Every method's file defines its own and adds it to `SCORES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..layouts import widened

_CHUNK = 1024


class Statistics(NamedTuple):
    """What a score may look at, fp32 [units, width]: width is 1 for MLP channels, the head size for query heads.

    Attributes:
        energy: mean of z^2 of the intermediate state z (input of the output projection): the probe's, fused with the
            history's, or the history's alone.
        mean: mean of z, likewise.
        column: the score's own number for each column of the output projection.
        dropped: how many units will be dropped.
        gram: fp32 [units, units] (`runtime.head_gram`), of probe and history; None for a score that does not read it.
        exports: an exported graph is being traced.
    """

    energy: Tensor
    mean: Tensor
    column: Tensor
    dropped: int
    gram: Tensor | None
    exports: bool = False


@dataclass(frozen=True)
class Score:
    """A channel and head score.

    Attributes:
        column: weight of the output projection [H, C] -> fp32 [C], computed once at transform.
        units: Statistics -> fp32 [units], larger is more important.
        relative: divide every row of z by its norm first.
        gram: it reads the Gram matrix of the heads' outputs; such a score is for heads alone.
    """

    column: Callable[[Tensor], Tensor]
    units: Callable[[Statistics], Tensor]
    relative: bool = False
    gram: bool = False


SCORES: dict[str, Score] = {}
"""By registry name."""


@torch.no_grad()
def column_sum(weight: Tensor, power: int) -> Tensor:
    """Sum over the rows of |W[:, j]|^power in fp32, without an fp32 copy of the weight: [H, C] -> [C]."""
    total = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in torch.split(widened(weight.detach()), _CHUNK):
        total += rows.float().abs().pow(power).sum(0)
    return total
