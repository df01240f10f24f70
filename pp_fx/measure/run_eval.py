"""Perplexity and time of a model, dense and pruned, one after the other: what `pp-fx eval` shows."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch

from ..calibration.calibrate import calibrate
from ..checks import check_integers
from ..config import ProbePruningConfig
from ..ranks import sharing
from ..requirements import versions
from ..rewrite.transform import transform
from ..runtime.modes import history_frozen
from .evaluate import evaluate
from .macs import count_macs, kept_per_layer


def run_eval(
    model: Any,
    ids: torch.Tensor,
    batch: int,
    config: ProbePruningConfig,
    calibration: torch.Tensor | None,
    *,
    compiled: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate dense, transform in place, calibrate, evaluate pruned; the dict that `--json` writes.

    Compiled models are warmed up on the first batch with the history frozen, and measured frozen, so that `seconds`
    excludes compilation.
    """
    check_integers(1, batch=batch)
    rank, ranks = sharing(model)

    def measure(label: str) -> Any:
        forward = torch.compile(model, fullgraph=True) if compiled else None
        if forward is not None:
            with torch.no_grad(), history_frozen(model):
                forward(input_ids=ids[:batch], use_cache=False)
                return evaluate(model, ids, batch, forward=forward, progress=label if progress else None)
        with history_frozen(model) if ranks > 1 else contextlib.nullcontext():  # each rank would learn of its own share
            return evaluate(model, ids, batch, progress=label if progress else None)

    dense = measure("dense")
    transform(model, config)
    if calibration is not None:
        calibrate(model, calibration[rank::ranks], progress=progress)
    pruned = measure("pruned")
    macs = count_macs(model, min(batch, len(ids)), ids.shape[1])
    stderr = pruned.stderr_vs(dense) if len(ids) > 1 else None
    return {
        "config": config.to_dict(),
        "tokens": ids.numel(),
        "dense": dense.to_dict(),
        "pruned": {**pruned.to_dict(), "nll_stderr_vs_dense": stderr},
        "macs": dataclasses.asdict(macs),
        "kept": kept_per_layer(model),
        "versions": versions(),
    }
