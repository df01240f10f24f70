"""What stands in for the dropped channels: a vector added to the branch's output, by registry name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .state import GroupState

Compensation = Callable[["GroupState", Tensor, "Tensor | None", Tensor], Tensor]


def mean(state: GroupState, kept_columns: Tensor, probe_mean: Tensor | None, weight: Tensor) -> Tensor:
    """The dropped channels' mean output, W @ mu: mu is part history, part probe (FLAP's bias, made dynamic).

    Without history yet (`state.seen` is 0) the probe alone gives the mean.

    Args:
        state: of the group; `state.mean` is fp32 [C].
        kept_columns: int64 [k], input columns of the output projection that run.
        probe_mean: fp32 [C], mean of the probe state over its real rows; None without a probe (the history decides).
        weight: output projection [H, C].

    Returns:
        [H] in the weight's dtype.
    """
    history = state.mean
    if probe_mean is None:
        mu: Any = history
    elif history is None:
        mu = probe_mean
    else:
        share = state.config.compensation_mix * state.seen
        mu = share * history + (1 - share) * probe_mean
    dropped = torch.ones_like(mu).index_fill(0, kept_columns, 0)
    return weight @ (mu * dropped).to(weight.dtype)


COMPENSATIONS: dict[str, Compensation] = {"mean": mean}
