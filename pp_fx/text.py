"""Evaluation and calibration text as token sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import check_integers
from .errors import InputError

PYTHON_DOCS = "python-docs"
"""Name of the text that is always at hand: the language reference inside Python's own `pydoc_data.topics`."""


def read(name: str, argument: str = "text") -> str:
    """The text of a UTF-8 file, or of "python-docs"; `argument` is what an error calls the name.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or is empty.
    """
    if name == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    try:
        text = Path(name).read_text(encoding="utf-8-sig")  # a byte order mark is no token
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{argument}={name!r} cannot be read ({error}); give a UTF-8 file or {PYTHON_DOCS!r}"
        ) from None
    if not text.strip():
        raise InputError(f"{argument}={name!r} is empty; give a UTF-8 file with text or {PYTHON_DOCS!r}")
    return text


def sequences(text: str, tokenizer: Any, count: int | None, length: int, skip: int = 0) -> Tensor:
    """Consecutive sequences from the text's start, without special tokens.

    Args:
        text: any text.
        tokenizer: a transformers tokenizer.
        count: how many sequences; None takes all that fit.
        length: tokens per sequence, at least 2.
        skip: sequences to leave out first.

    Returns:
        int64 [count, length].

    Raises:
        InputError: the text is too short, or a number is out of range.
    """
    check_integers(2, length=length)
    check_integers(1, sequences=1 if count is None else count)
    check_integers(0, skip=skip)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    available = len(ids) // length - skip
    if available < (count or 1):
        raise InputError(
            f"the text has {len(ids)} tokens, enough for {max(available, 0)} sequences of length={length}"
            f"{f' after skip={skip}' if skip else ''}, but sequences={count or 1}; give more text or lower them"
        )
    return ids[skip * length :][: (count or available) * length].view(-1, length).to(torch.long)
