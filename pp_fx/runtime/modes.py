"""Attributes that have other values for a while: of states and layers, put back whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ..config import ProbePruningConfig
from .names import LAYER
from .state import states_of


@contextlib.contextmanager
def put_back(objects: Iterable[Any], *names: str, **values: Any) -> Iterator[None]:
    """After the context every object's attributes are as they were.

    Args:
        objects: of any kind.
        *names: attributes that change inside.
        **values: attributes that have these values inside.
    """
    objects, every = list(objects), (*names, *values)
    before = [[getattr(o, name) for name in every] for o in objects]
    try:
        for o in objects:
            for name, value in values.items():
                setattr(o, name, value)
        yield
    finally:
        for o, old in zip(objects, before, strict=True):
            for name, value in zip(every, old, strict=True):
                setattr(o, name, value)


@contextlib.contextmanager
def history_frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the context, forward passes select but leave the history as it is.

    ```python
    with pp_fx.history_frozen(model):
        model(**inputs)
    ```

    Args:
        model: a transformed model; of any other nothing changes.

    Yields:
        The model.
    """
    with put_back(states_of(model), mode="frozen"):
        yield model


@contextlib.contextmanager
def guard_lifted(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the context calls of every size select: calibration reads small batches, too.

    Args:
        layers: rewritten layers.
    """
    with put_back([layer.__dict__[LAYER] for layer in layers], guard_tokens=0):
        yield


def auto_steps(layers: Iterable[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Inside the context decode="auto" steps in batches of every size, as an exported graph does.

    Args:
        layers: rewritten layers.
    """
    return _changed(layers, lambda settings: {"decode": "step"} if settings.decode == "auto" else {})


def selections_kept(layers: Iterable[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Inside the context a KV cache holds what its prompt has selected, whatever decoding makes of it.

    Args:
        layers: rewritten layers.
    """
    dense = {"decode": "dense", "decode_ratio": None, "step_probe": None}
    return _changed(layers, lambda settings: dense if settings.steps else {})


@contextlib.contextmanager
def _changed(layers: Iterable[nn.Module], changes: Callable[[ProbePruningConfig], dict[str, Any]]) -> Iterator[None]:
    """Inside the context the layers' settings have the changes that are made of them."""
    infos = [layer.__dict__[LAYER] for layer in layers]
    with put_back(infos, "settings"):
        for info in infos:
            info.settings = dataclasses.replace(info.settings, **changes(info.settings))
        yield
