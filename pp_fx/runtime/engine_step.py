"""What one step of an engine with continuous batching does with its tokens.

Such an engine (vLLM, transformers' `generate_batch`) runs one flat row of tokens at every step: parts of some prompts,
and one token each of the sequences that decode. Requests come and go, so a selection belongs to the step and to nothing
else. Prompts are where an engine is bound by compute; one set of channels for many sequences that decode costs too much
quality (docs/generation.md). So tokens of prompts are pruned, and tokens that decode run dense or, with
`decode="step"`, choose for themselves (`step`), whoever else is in the step. Who wants the one set nevertheless has it
with `decode="rolling"` (`rolling`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..config import ProbePruningConfig
from ..errors import ConfigError
from .selections import put_selections

DECODES = ("auto", "dense", "step", "rolling")
"""What `decode` may say; "auto" is "dense" here."""


class EngineStep(NamedTuple):
    """How the tokens of a step run.

    Attributes:
        prompts: int64 [P], ascending places in the flat row of the tokens of prompts; None where all tokens run in one
            way: those of prompts, or, if `decode` is not "dense", those that decode.
        others: int64 [D], the other places: tokens that decode, then padding; None with `prompts`.
        prunes: whether the tokens of prompts are pruned; else they run all channels.
        decode: how the others run: all channels, those that each chooses for itself, or those of the engine's one
            selection.
        decoding: how many of the others decode, of "rolling"; the rest is padding.
        reprobes: whether the selection of "rolling" is made anew with this step.
        cache: of "rolling", what the selection and the last tokens lie on; of steps without tokens that decode, too.
    """

    prompts: Tensor | None = None
    others: Tensor | None = None
    prunes: bool = False
    decode: Literal["dense", "step", "rolling"] = "dense"
    decoding: int = 0
    reprobes: bool = False
    cache: Any = None

    def to(self, device: torch.device) -> EngineStep:
        """The same step, its index tensors on a device."""
        if self.prompts is None or self.others is None:
            return self
        return self._replace(prompts=self.prompts.to(device), others=self.others.to(device))


ALL_DENSE = EngineStep()
"""A step whose tokens all run all channels."""


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
        ConfigError: heads are to be pruned, decoding is to follow its prompt, positions count, or the probe ranks rows.
    """
    heads, ratio = settings.attention_ratio, settings.decode_ratio
    if any(heads if isinstance(heads, tuple) else (heads,)):
        raise ConfigError(f"attention_ratio={heads}: {engine} prunes channels of MLPs alone; set it to 0{where}")
    if settings.decode not in DECODES:
        raise ConfigError(
            f"decode={settings.decode!r}: no selection belongs to one sequence in {engine}; set one of "
            f"{', '.join(map(repr, DECODES))}{where}"
        )
    if ratio is not None and settings.decode != "step":
        raise ConfigError(
            f"decode_ratio={ratio}: with decode={settings.decode!r} decoding runs dense in {engine}; leave it None, or "
            f"set decode='step'{where}"
        )
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


def plan_step(
    starts: Sequence[int], tokens: int, settings: ProbePruningConfig, cache: Any = None, owner: int = 0
) -> EngineStep:
    """How the tokens of a step run.

    Requests of more than one token run a prompt, or a chunk of one; those of a single token decode (so does a prompt's
    chunk of a single token, which nothing tells apart). A step with fewer prompt tokens than `min_select_tokens` runs
    them dense: deciding would cost more than it saves. Where the history alone selects, they are always pruned.

    Args:
        starts: where each request's tokens begin in the flat row, and where the last one's end (`query_start_loc`,
            `cu_seq_lens_q`): ascending, [requests + 1].
        tokens: of the flat row; what lies behind the last request is padding and runs as tokens that decode do.
        settings: of the model.
        cache: with decode="rolling", any object that lives as long as the engine: its steps are counted on it.
        owner: identity of the transform.

    Returns:
        The step; its index tensors lie on the CPU.
    """
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    decoding, count = lengths.count(1), sum(n for n in lengths if n > 1)
    prunes = count > 0 and (count >= settings.min_select_tokens or by_history(settings))
    step = EngineStep(prunes=prunes, cache=cache if settings.decode == "rolling" else None)
    if decoding and settings.decode == "step":
        step = step._replace(decode="step")
    elif decoding and settings.decode == "rolling":
        step = step._replace(decode="rolling", decoding=decoding, reprobes=_reprobes(settings, cache, owner))
    if count in (0, tokens) or (step.decode == "dense" and not prunes):
        return step
    inside = torch.zeros(tokens, dtype=torch.bool)
    for a, b in itertools.pairwise(starts):
        inside[a:b] = b - a > 1
    return step._replace(prompts=inside.nonzero()[:, 0], others=(~inside).nonzero()[:, 0])


def _reprobes(settings: ProbePruningConfig, cache: Any, owner: int) -> bool:
    """Count a step with tokens that decode; whether they are probed with it."""
    if by_history(settings):
        return False
    counted = put_selections(cache, owner)
    counted.age += 1
    if counted.age < settings.reprobe_every:
        return False
    counted.age = 0
    return True
