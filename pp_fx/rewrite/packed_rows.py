"""Rows that hold several sequences (packed, padding-free): refused where the probe would look across their borders.

MLPs look at single tokens, and with a mask [B, 1, T, S] the probe's queries see what the mask lets them see:
transformers makes one where `position_ids` restart. What is left are attention functions that get no mask, and probes
that do not read one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import ProbePruningConfig
from ..errors import StateError


def check_packed(settings: ProbePruningConfig, heads: bool, module: nn.Module, kwargs: dict[str, Any]) -> None:
    """At every call; a compiled model is not looked at.

    Args:
        settings: of the model.
        heads: whether attention heads are pruned.
        module: the module that holds the layers.
        kwargs: of its call.

    Raises:
        StateError: the row holds several sequences, and heads are probed without their borders, or the history counts
            positions.
    """
    rows = settings.probe is not None and settings.probe.attention == "rows"
    flash = "flash" in str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
    blind = heads and (rows or flash)
    if not (blind or settings.history == "position") or torch.compiler.is_compiling() or not _is_packed(kwargs):
        return
    what, remedy = "history='position' would count on from one to the next", "set history='channel'"
    if blind:
        what = "the probe of attention heads would look from one into another"
        remedy = "set attention_ratio=0, or probe.attention='queries' without flash attention"
    raise StateError(
        f"the row holds several sequences (position_ids restart, or cu_seq_lens_q is given), and {what}; {remedy}, or "
        "give padded sequences and an attention_mask"
    )


def _is_packed(kwargs: dict[str, Any]) -> bool:
    """As transformers sees it (`masking_utils.find_packed_sequence_indices`): no mask, no cache, and a restart."""
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return False
    if kwargs.get("cu_seq_lens_q") is not None:
        return True
    positions = kwargs.get("position_ids")
    return isinstance(positions, Tensor) and positions.ndim == 2 and bool((positions.diff() != 1).any())
