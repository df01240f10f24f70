"""`pp_fx::boundary`: marks in a traced graph where a decoder layer begins and ends."""

from __future__ import annotations

import torch
from torch import Tensor


def _boundary(x: Tensor, position: int, enters: bool) -> Tensor:
    return x.clone()


_mark = torch.library.custom_op("pp_fx::boundary", _boundary, mutates_args=())
_mark.register_fake(lambda x, position, enters: torch.empty_like(x))
BOUNDARY = torch.ops.pp_fx.boundary.default


def boundary(x: Tensor, position: int, enters: bool) -> Tensor:
    """A copy of the hidden states that marks in a traced graph where the layer at `position` begins or ends."""
    return _mark(x, position, enters)
