"""`pp_fx.cache.reserve`: the memory of a generation's selections before its first call."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ..checks import check_integers
from ..errors import InputError, StateError
from ..runtime.modes import guard_lifted, history_frozen
from ..runtime.names import SELECTIONS
from ..runtime.selections import forget, selections_on
from .layer import layers_of, settings_of


def reserve(model: nn.Module, cache: Cache, batch: int) -> Cache:
    """Give a KV cache the memory of its selections before its first call.

    What a generation keeps (indices, compact weights, windows of re-probes) is otherwise made by the first prompt. That
    is too late for a prompt that is compiled with CUDA graphs (`torch.compile(model, mode="reduce-overhead")`), whose
    outputs its next run overwrites. transformers asks the same of keys and values: `cache.early_initialization(..)`.
    One short prompt runs uncompiled on a cache of its own; the history does not change.

    Args:
        model: a transformed model (or a wrapper of one).
        cache: an empty cache for it, for example `StaticCache(config=model.config, max_cache_len=1024)`.
        batch: sequences of the calls that will use it (beams counted).

    Returns:
        The same cache.

    Raises:
        StateError: the model is not transformed, the cache holds tokens, or it lies on another device.
        InputError: `cache` is no transformers Cache, or `batch` no positive integer.
    """
    settings, layers = settings_of(model), layers_of(model)
    check_integers(1, batch=batch)
    if not isinstance(cache, Cache):
        raise InputError(f"cache={type(cache).__name__} is no KV cache; give a transformers Cache, such as StaticCache")
    if int(cache.get_seq_length()):
        raise StateError("cache holds tokens already; reserve before its first call, or after cache.reset()")
    inner: Any = next(m for m in model.modules() if hasattr(m, "get_input_embeddings") and hasattr(m, "config"))
    weight = inner.get_input_embeddings().weight
    _check_device(cache, weight.device)
    ids = torch.arange(batch * settings.min_select_tokens, device=weight.device) % weight.shape[0]
    scratch = DynamicCache()
    modes = torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager")
    with contextlib.ExitStack() as stack:
        for mode in (*modes, history_frozen(inner), guard_lifted(layers)):
            stack.enter_context(mode)  # type: ignore[arg-type]
        inner(input_ids=ids.view(batch, -1), past_key_values=scratch, use_cache=True)
    found = selections_on(scratch)
    if found is not None:
        forget(scratch)
        found.reserved = batch
    setattr(cache, SELECTIONS, found)
    return cache


def _check_device(cache: Cache, device: torch.device) -> None:
    """Refuse a cache whose keys lie elsewhere.

    Raises:
        StateError: they do.
    """
    keys = next((k for layer in cache.layers if isinstance(k := getattr(layer, "keys", None), Tensor)), None)
    if keys is not None and keys.device != device:
        raise StateError(f"cache lies on {keys.device}, the model on {device}; make a new cache on the model's device")
