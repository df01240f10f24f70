"""What one step of an engine with continuous batching does with its tokens.

Such an engine (vLLM, transformers' `generate_batch`) runs one flat row of tokens at every step: parts of some prompts,
and one token each of the sequences that decode. Requests come and go, so a selection belongs to the step and to nothing
else. Prompts are where an engine is bound by compute; one set of channels for many sequences that decode costs too much
quality (docs/generation.md). So tokens of prompts are pruned, tokens that decode run dense.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ProbePruningConfig


class EngineStep(NamedTuple):
    """Which of a step's tokens are pruned.

    Attributes:
        pruned: int64 [P], ascending places in the flat row; None for all of them.
        dense: int64 [D], the other places; None for none of them.
    """

    pruned: Tensor | None
    dense: Tensor | None

    @property
    def prunes(self) -> bool:
        """Whether there is anything to prune."""
        return self.pruned is None or self.pruned.shape[0] > 0


ALL_DENSE = EngineStep(torch.empty(0, dtype=torch.int64), None)
"""A step that prunes nothing."""


def by_history(settings: ProbePruningConfig) -> bool:
    """Whether the history alone selects, once and for all: then no request depends on its company."""
    return settings.freeze_history or settings.probe is None


def plan_step(starts: Sequence[int], tokens: int, settings: ProbePruningConfig) -> EngineStep:
    """Which tokens of a step are pruned.

    Requests of more than one token run a prompt, or a chunk of one; those of a single token decode (so does a prompt's
    chunk of a single token, which nothing tells apart). A step with fewer prompt tokens than `min_select_tokens` runs
    dense: deciding would cost more than it saves. Where the history alone selects, prompt tokens are always pruned.

    Args:
        starts: where each request's tokens begin in the flat row, and where the last one's end (`query_start_loc`,
            `cu_seq_lens_q`): ascending, [requests + 1].
        tokens: of the flat row; what lies behind the last request is padding and runs dense.
        settings: of the model.

    Returns:
        The step; its index tensors lie on the CPU.
    """
    prompts = [(a, b) for a, b in itertools.pairwise(starts) if b - a > 1]
    count = sum(b - a for a, b in prompts)
    if count == 0 or (count < settings.min_select_tokens and not by_history(settings)):
        return ALL_DENSE
    if count == tokens:
        return EngineStep(None, None)
    pruned = torch.zeros(tokens, dtype=torch.bool)
    for a, b in prompts:
        pruned[a:b] = True
    return EngineStep(pruned.nonzero()[:, 0], (~pruned).nonzero()[:, 0])
