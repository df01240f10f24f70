"""Rewrites of a traced phase, in the dialect of onnx_ir's own passes (`onnx_ir.passes`)."""

import onnx_ir.passes.common as common
from onnxscript import ir

from ..outside import Outside
from .compact_ops import UseCompactOps
from .keep_logits import KeepLogits
from .read_outside import ReadOutside
from .simplify import GroupHeads, SkipSingleSplits, WidenBfloat16
from .store_transposed import StoreTransposed


def phase_passes(outside: Outside) -> ir.passes.Sequential:
    """What a phase goes through before its layers are repeated, in order."""
    return ir.passes.Sequential(
        WidenBfloat16(),
        GroupHeads(),
        SkipSingleSplits(),
        UseCompactOps(),
        common.RemoveUnusedNodesPass(),
        ReadOutside(outside),
        KeepLogits(outside),
        StoreTransposed(outside),
    )


__all__ = [
    "GroupHeads",
    "KeepLogits",
    "ReadOutside",
    "SkipSingleSplits",
    "StoreTransposed",
    "UseCompactOps",
    "WidenBfloat16",
    "phase_passes",
]
