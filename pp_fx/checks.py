"""Checks of arguments that several functions share; what they raise names the argument, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, PpFxError


def check_integers(low: int, error: type[PpFxError] = InputError, /, **given: Any) -> None:
    """Every keyword must be an integer of at least `low`.

    Raises:
        InputError: one is not (or the `error` that is given, as in all checks of this module).
    """
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise error(f"{name}={value!r} is not valid; give an integer >= {low}")


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    high_open: bool = False,
    error: type[PpFxError] = InputError,
) -> None:
    """A finite number from `low` to `high`, each included unless it is open.

    Raises:
        InputError: it is not.
    """
    interval = f"{'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == math.inf:
        raise error(f"{name}={value!r} is not a finite number; give a number in {interval}")
    if value < low or value > high or (high_open and value == high) or (low_open and value == low):
        raise error(f"{name}={value!r} is out of range; give a number in {interval}")


def check_choice(name: str, value: Any, choices: Iterable[Any], *, error: type[PpFxError] = InputError) -> None:
    """One of the choices, which are texts or None.

    Raises:
        InputError: it is none of them.
    """
    choices = tuple(choices)
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        raise error(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def check_flag(name: str, value: Any, *, error: type[PpFxError] = InputError) -> None:
    """True or False.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(value, bool):
        raise error(f"{name}={value!r} is not a boolean; give True or False")


def check_list(name: str, value: Any, example: str) -> None:
    """A tuple or list with at least one element; a lone string or number would be taken apart or not be iterable.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, tuple | list) or not value:
        raise InputError(f"{name}={value!r} is not valid; give a tuple of at least one, for example {example}")


def check_token_ids(model: nn.Module, ids: Any, what: str) -> None:
    """`check_ids` with the vocabulary of a model's input embeddings, and its learned positions.

    Raises:
        InputError: the ids cannot be used, or are more than the model has learned positions for.
    """
    check_ids(ids, model.get_input_embeddings().weight.shape[0], what)  # type: ignore[operator]
    limit = learned_positions(model)
    if limit is not None and ids.shape[1] > limit:
        raise InputError(
            f"{what} has length={ids.shape[1]}, the model has learned {limit} positions; give sequences of at most so "
            "many tokens"
        )


def learned_positions(model: Any) -> int | None:
    """How many positions a model has an embedding for (GPT-2, OPT); None where positions are computed."""
    config, tokens = model.config.get_text_config(), model.get_input_embeddings()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    # OPT's table has two rows in front
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return limit if any(m.num_embeddings in (limit, limit + 2) for m in tables) else None


def check_ids(ids: Any, vocabulary: int, what: str) -> None:
    """Token ids must be an integer tensor [B, T] within the vocabulary, with B and T at least 1.

    Raises:
        InputError: they are not.
    """
    if not isinstance(ids, Tensor):
        raise InputError(f"{what} is {type(ids).__name__}, no tensor; give integer token ids [B, T]")
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"{what} is {ids.dtype} of shape {tuple(ids.shape)}; give integer token ids [B, T]")
    if 0 in ids.shape:
        raise InputError(f"{what} has shape {tuple(ids.shape)}, no token at all; give sequences of length >= 1")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise InputError(f"{what} holds token id {bad}, out of range [0, {vocabulary}); use this model's tokenizer")
