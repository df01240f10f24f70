"""Calibration: fill the history from dense forward passes over sample text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .arguments import check_integers, check_token_ids
from .defaults import own_defaults
from .errors import InputError, StateError
from .gram import gram_of_sums
from .guard import guard_lifted
from .progress import track
from .sketch import Sketch
from .state import GroupState, states_of
from .transform import layers_of

_INPUTS = ("input_ids", "attention_mask", "position_ids")


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

    Under torch.distributed every rank gives batches of its own, and all end with the history of all batches.

    Returns:
        The same model. Its former history is replaced.

    Raises:
        StateError: the model is not transformed, or in training mode.
        InputError: no batch, wrong type, sequence of length 0, token ids out of range, or activations that are not
            finite. The history is left as it was.
    """
    layers_of(model)
    if model.training:
        raise StateError("model is in training mode; call model.eval() before calibrate")
    states = [s for s in states_of(model) if s.prunes]
    before = [s.mode for s in states]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    try:
        for state in states:
            state.mode, state.sums = "calibrate", {}
            state.sketch = None if state.directions is None else Sketch(len(state.directions))
        failed: Exception | None = None
        try:
            # inside: input that one rank alone cannot use must not leave the others waiting
            count = _run(model, states, _batches(batches, tokenizer, length, batch_size), device, progress)
        except Exception as error:
            count, failed = 0, error
        distributed.agree(failed)
        if sum(distributed.gather(count)) == 0:
            raise InputError("batches is empty; give at least one batch of token ids")
        distributed.merge_statistics(states)
        for state in states:
            _commit(state)
    finally:
        for state, mode in zip(states, before, strict=True):
            state.mode, state.sums, state.sketch = mode, {}, None
    return model


def _run(model: Any, states: list[GroupState], batches: Any, device: Any, progress: bool) -> int:
    """Dense forward passes that add to the states' sums; how many batches there were."""
    count = 0
    for index, batch in enumerate(track(batches, "calibrate", progress)):
        inputs = _inputs(model, batch, index)
        # statistics are gathered in Python, so a compiled forward runs uncompiled here
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), guard_lifted(layers_of(model)):
            model(**{k: v.to(device) for k, v in inputs.items()}, use_cache=False)
        _check_finite(states, index)
        count += 1
    return count


def _batches(batches: Any, tokenizer: Any, length: int, batch_size: int) -> Any:
    check_integers(1, batch_size=batch_size)
    if isinstance(batches, str):
        batches = [batches]
    if not isinstance(batches, Tensor | Mapping | str) and isinstance(batches, Sequence):  # a datasets column is one
        batches = list(batches)
    if isinstance(batches, list) and batches and all(isinstance(b, str) for b in batches):
        if tokenizer is None:
            raise InputError("batches holds texts but tokenizer is None; give the model's tokenizer")
        from .text import sequences

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


def _check_finite(states: list[GroupState], index: int) -> None:
    for state in states:
        for value in state.sums.values():
            if not bool(value.isfinite().all()):
                raise InputError(
                    f"batches[{index}] gives activations that are not finite (NaN or Inf) in {state.name}; "
                    "leave the batch out or run the model in a wider dtype"
                )


def _commit(state: GroupState) -> None:
    if state.energy is None or state.mean is None:
        return
    count = state.sums["count"]
    total = count.sum()
    if total == 0:
        raise InputError("batches holds padding alone; give at least one real token")
    energy = state.sums["energy"] / count.clamp(min=1).unsqueeze(-1)
    with torch.inference_mode(False), torch.no_grad():
        if state.energy.ndim == 2:
            rows = min(len(energy), len(state.energy))
            # positions never seen take the mean over the seen ones
            state.energy.copy_((state.sums["energy"].sum(0) / total).expand_as(state.energy))
            known = count[:rows] > 0
            state.energy[:rows][known] = energy[:rows][known].to(state.energy.dtype)
        else:
            state.energy.copy_(energy)
        state.mean.copy_(state.sums["mean"] / total)
        if state.gram is not None:
            state.gram.copy_(gram_of_sums(state.sums))
        if state.directions is not None and state.sketch is not None:
            found = state.sketch.directions()
            state.directions.zero_()
            if found is not None:
                state.directions[: len(found)].copy_(found)
        state.seen.fill_(1.0)
    state.calibrated = True
