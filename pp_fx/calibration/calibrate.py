"""Calibration: fill the history from dense forward passes over sample text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ranks
from ..checks import check_integers, check_token_ids
from ..errors import InputError, StateError
from ..process_settings import own_defaults
from ..progress import track
from ..rewrite.layer import layers_of
from ..runtime.modes import guard_lifted, put_back
from ..runtime.names import LAYER
from ..runtime.state import states_of
from ..text import sequences
from .collect import Collected

_INPUTS = ("input_ids", "attention_mask", "position_ids")
_END = object()


@own_defaults()
def calibrate(
    model: nn.Module,
    batches: Any,
    *,
    tokenizer: Any = None,
    length: int = 512,
    batch_size: int = 16,
    progress: bool = True,
) -> nn.Module:
    """Set the history (paper, section 3.2) to the statistics of the dense model over the given batches.

    Args:
        model: a transformed model.
        batches: one of: int64 [N, T] token ids (cut into batches of `batch_size`); an iterable (a DataLoader, a
            list) of such tensors or of dicts of model inputs with `input_ids` and optionally `attention_mask`, as
            tensors or lists; with `tokenizer` a text, a list of texts or lines, or a column of a `datasets.Dataset`
            (`dataset["text"]`).
        tokenizer: for texts, which are joined by blank lines and cut into sequences of `length` tokens.
        length: tokens per sequence of a text.
        batch_size: sequences per batch of a tensor or of texts.
        progress: show a progress bar on stderr.

    Under torch.distributed every rank gives batches of its own, and all end with the history of all batches. Of a
    tensor parallel model all ranks give the same batches, and each ends with the history of its own shard.

    Returns:
        The same model. Its former history is replaced.

    Raises:
        StateError: the model is not transformed, or in training mode.
        InputError: no batch, wrong type, sequence of length 0, token ids out of range, or activations that are not
            finite. The history is left as it was.
    """
    shards = layers_of(model)[0].__dict__[LAYER].shards
    if model.training:
        raise StateError("model is in training mode; call model.eval() before calibrate")
    states = [s for s in states_of(model) if s.prunes]
    statistics = [Collected(state) for state in states]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    with put_back(states, "collector", mode="calibrate"):
        for state, found in zip(states, statistics, strict=True):
            state.collector = found
        # each rank has a share of the batches, or, in tensor parallel, of the model
        whole, cut = (ranks.everyone(), None) if shards is None else (None, shards.group)
        with ranks.agreed(whole):  # inside: input that one rank alone cannot use must not leave the others waiting
            with ranks.agreed(cut):
                given = _batches(batches, tokenizer, length, batch_size)
            count = _run(model, statistics, given, device, progress, cut)
        if sum(ranks.of_all(count)) == 0:
            raise InputError("batches is empty; give at least one batch of token ids")
        for found in statistics if whole is not None else ():
            found.merge(ranks.of_all(found.parts()))
        for found in statistics:
            found.commit()
    return model


def _run(model: Any, statistics: list[Collected], batches: Any, device: Any, progress: bool, cut: Any) -> int:
    """Dense forward passes that add to the statistics; how many batches there were.

    `cut`: the process group of a tensor parallel model, whose ranks run every batch together, or none does.
    """
    count, given = 0, iter(track(batches, "calibrate", progress))
    while True:
        with ranks.agreed(cut):
            batch = next(given, _END)
            inputs = {} if batch is _END else _inputs(model, batch, count)
        if cut is not None:
            _check_same(inputs, count, cut)
        if not inputs:
            return count
        # statistics are gathered in Python, so a compiled forward runs uncompiled here
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), guard_lifted(layers_of(model)):
            model(**{k: v.to(device) for k, v in inputs.items()}, use_cache=False)
        with ranks.agreed(cut):
            for found in statistics:
                found.check_finite(f"batches[{count}]")
        count += 1


def _check_same(inputs: dict[str, Tensor], index: int, group: Any) -> None:
    digest = hashlib.sha256()
    for name, value in inputs.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    found = ranks.of_all(digest.hexdigest(), group)
    odd = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if odd is not None:
        raise InputError(
            f"batches[{index}] of rank {odd} is not that of rank 0; a tensor parallel model runs the same batches on "
            "all ranks"
        )


def _batches(batches: Any, tokenizer: Any, length: int, batch_size: int) -> Any:
    check_integers(1, batch_size=batch_size)
    if isinstance(batches, str):
        batches = [batches]
    if not isinstance(batches, Tensor | Mapping | str) and isinstance(batches, Sequence):  # a datasets column is one
        batches = list(batches)
    if isinstance(batches, list) and batches and all(isinstance(b, str) for b in batches):
        if tokenizer is None:
            raise InputError("batches holds texts but tokenizer is None; give the model's tokenizer")
        # joined, as other tools do: lines are shorter than a sequence
        batches = sequences("\n\n".join(batches), tokenizer, None, length)
    if isinstance(batches, Tensor):
        if batches.ndim != 2:
            raise InputError(f"batches has shape {tuple(batches.shape)}; give token ids of shape [N, T]")
        return list(batches.split(batch_size)) if batches.shape[0] else []
    if isinstance(batches, Mapping):
        return [batches]
    if not isinstance(batches, Iterable):
        raise InputError(f"batches={type(batches).__name__} cannot be iterated; give tensors, dicts, texts or a loader")
    return batches


def _inputs(model: nn.Module, batch: Any, index: int) -> dict[str, Tensor]:
    where = f"batches[{index}]"
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if isinstance(batch, Mapping):
        batch = {k: _as_tensor(v) if k in _INPUTS else v for k, v in batch.items()}
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise InputError(f"{where} is {type(batch).__name__}; give token ids [B, T] or a dict with input_ids")
    inputs = {k: batch[k] for k in _INPUTS if batch.get(k) is not None}
    check_token_ids(model, inputs["input_ids"], f"{where} input_ids")
    for key, value in inputs.items():
        if value.shape != inputs["input_ids"].shape:
            raise InputError(f"{where} {key} has shape {tuple(value.shape)}, not that of input_ids; pad them alike")
    return inputs


def _as_tensor(value: Any) -> Any:
    """Lists of integers, of one sequence or of several of equal length, as int64 [B, T]; anything else as it is."""
    if not isinstance(value, list | tuple):
        return value
    try:
        tensor = torch.tensor(value)
    except (TypeError, ValueError):
        return value
    return tensor[None] if tensor.ndim == 1 else tensor
