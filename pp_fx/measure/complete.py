"""Greedy completions of texts, cut where a stop string begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..checks import check_integers, learned_positions
from ..errors import InputError
from ..progress import track
from ..runtime.modes import put_back


@dataclass(frozen=True)
class Completions:
    """What follows each prompt, and how long generating took.

    Attributes:
        texts: one for each prompt, without the prompt and without the stop string.
        seconds: wall time of `generate`.
    """

    texts: tuple[str, ...]
    seconds: float


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch: int,
    new_tokens: int,
    stops: tuple[str, ...] = (),
    progress: str | None = None,
) -> Completions:
    """Greedy completions, whatever the model's own generation settings say; only its end tokens are used of these.

    Args:
        model: any causal language model in eval mode.
        tokenizer: its tokenizer, with whatever padding.
        prompts: texts; consecutive ones share a batch, padded on the left.
        batch: prompts per call of `generate`. A transformed model selects once per batch.
        new_tokens: at most so many of each; a batch ends before, where all of its texts met a stop string or ended.
        stops: ASCII strings that a text is cut at.
        progress: label of a progress bar on stderr, or None.

    Returns:
        Completions.

    Raises:
        InputError: a number is out of range, or a prompt and its completion need more positions than the model has.
    """
    check_integers(1, batch=batch, new_tokens=new_tokens)
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    longest, limit = max(map(len, rows), default=0), learned_positions(model)
    if limit is not None and longest + new_tokens > limit:
        raise InputError(
            f"new_tokens={new_tokens} after prompts of up to {longest} tokens is more than the {limit} positions that "
            f"the model has learned; {f'give at most {limit - longest}' if limit > longest else 'give another model'}"
        )
    ends = _ends(model)
    pad = tokenizer.pad_token_id
    pad = (ends or [0])[0] if pad is None else pad
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=ends or None)
    texts: list[str] = []
    seconds = 0.0
    with put_back([model], generation_config=greedy):
        for first in track(range(len(rows)), progress or "", progress is not None):  # the bar counts prompts
            if first % batch:
                continue
            part = rows[first : first + batch]
            ids, mask = _left_padded(part, pad, model.get_input_embeddings().weight.device)
            criteria = StoppingCriteriaList([_Stop(tokenizer, ids.shape[1], stops)] if stops else [])
            start = time.perf_counter()
            found = model.generate(input_ids=ids, attention_mask=mask, stopping_criteria=criteria)
            new = found[:, ids.shape[1] :].tolist()  # waits for the device
            seconds += time.perf_counter() - start
            texts += [cut(_text(tokenizer, p, _ended(n, ends)), stops) for p, n in zip(part, new, strict=True)]
    return Completions(tuple(texts), seconds)


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class _Stop(StoppingCriteria):
    """Which rows have met a stop string, looked for in their last tokens at every step."""

    def __init__(self, tokenizer: Any, start: int, stops: tuple[str, ...]) -> None:
        self.tokenizer, self.start, self.stops = tokenizer, start, stops
        self.window = max(map(len, stops))  # tokens: each that is part of a stop string holds a character of it
        self.met: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.met = self.met or [False] * len(input_ids)
        last = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :].tolist()
        for index, row in enumerate(last):
            if not self.met[index]:
                text = _decoded(self.tokenizer, row)
                self.met[index] = any(stop in text for stop in self.stops)
        return torch.tensor(self.met, device=input_ids.device)


def _ends(model: Any) -> list[int]:
    """Ids that end a text."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]


def _ended(row: list[int], ends: list[int]) -> list[int]:
    """A row before its first end token; padding follows it."""
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def _left_padded(rows: list[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [B, T]."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _text(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """What the new tokens add to the prompt: alone, a SentencePiece tokenizer would take a blank from their front."""
    return _decoded(tokenizer, prompt + new)[len(_decoded(tokenizer, prompt)) :]


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
