"""Which rows of a batch hold a real token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .plan import LayerInfo, Plan


def real_rows(
    hidden_states: Tensor, attention_mask: Any, plan: Plan, layer: LayerInfo, inverted: bool
) -> Tensor | None:
    """Which rows hold a real token: bool [B, T], or None when all do (or nothing of this call asks).

    A position is real if it may attend to itself. Taken from the mask as the block receives it: None, [B, S] (flash
    attention) or [B, 1, T, S] (boolean or additive). `inverted`: the boolean mask is True where a token may not attend.

    Raises:
        InputError: the mask is of another kind (for example flex attention's BlockMask).
    """
    if attention_mask is None or not plan.selects or plan.engine is not None:
        return None  # an engine's step names its tokens itself
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim not in (2, 4):
        raise InputError(
            f"attention_mask of type {type(attention_mask).__name__} cannot be read; "
            "use attn_implementation='sdpa' or 'eager'"
        )
    length = hidden_states.shape[1]
    if attention_mask.ndim == 2:
        return attention_mask[:, -length:] != 0
    start = 0
    if plan.cache is not None:  # sliding windows do not hold the first keys
        start = plan.cache.get_seq_length(layer.index) - plan.cache.get_mask_sizes(length, layer.index)[1]
    own = torch.arange(length, device=attention_mask.device) + start
    own = own.view(1, length, 1).expand(attention_mask.shape[0], length, 1)
    diagonal = attention_mask[:, 0].gather(2, own).squeeze(2)
    real = diagonal ^ inverted if diagonal.dtype == torch.bool else diagonal >= 0
    return real.expand(hidden_states.shape[0], length)
