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
from ..errors import ConfigError

DECODES = ("auto", "dense")
"""What `decode` may say: tokens that decode run all channels."""


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


def check_settings(settings: ProbePruningConfig, engine: str, where: str = "") -> None:
    """Refuse what cannot be done for a flat row of many requests.

    Args:
        settings: of the model.
        engine: its name, for the message.
        where: the place at which they are changed, for the message: " in config.json".

    Raises:
        ConfigError: heads or decode steps are to be pruned, positions count, or the probe ranks rows.
    """
    heads, ratio = settings.attention_ratio, settings.decode_ratio
    if any(heads if isinstance(heads, tuple) else (heads,)):
        raise ConfigError(f"attention_ratio={heads}: {engine} prunes channels of MLPs alone; set it to 0{where}")
    if settings.decode not in DECODES:
        raise ConfigError(
            f"decode={settings.decode!r}: no selection belongs to one sequence in {engine}, where decoding runs dense; "
            f"set 'auto' or 'dense'{where}"
        )
    if ratio is not None:
        raise ConfigError(f"decode_ratio={ratio}: in {engine} decoding runs dense; leave it None{where}")
    if settings.history == "position":
        raise ConfigError(
            "history='position': a step's tokens have positions of many requests; calibrate with history='channel'"
        )
    if settings.guard:
        raise ConfigError("guard=True measures calls of one length; leave it out and set min_select_tokens")
    if settings.probe is None:
        return
    for name, able in (("ranking", "even"), ("sample_fraction", 1.0), ("first_position", "never")):
        if getattr(settings.probe, name) != able:
            raise ConfigError(
                f"probe.{name}={getattr(settings.probe, name)!r}: the probe of a step is spread evenly over the tokens "
                f"of many requests; set it to {able!r}{where}"
            )


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
