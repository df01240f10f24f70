"""The no-regret guard: which calls are too small for pruning to pay on this machine, measured once per structure.

Opt-in (`ProbePruningConfig.guard`), because what a model computes must not depend on the machine unasked.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..capture.calls import Call, record_calls
from ..runtime.modes import put_back
from ..runtime.names import LAYER
from .verify import random_call

logger = logging.getLogger(__name__)
TOKENS = (32, 64, 128, 256, 512, 1024)
"""Sizes of the calls that are measured, one sample each; they end at the model's context length."""
_REPEATS = 5
_measured: dict[tuple, float] = {}


def set_guard(model: nn.Module, layers: nn.ModuleList, longest: int) -> None:
    """Give every layer that prunes the number of tokens from which on its pruned call is not slower than its dense one.

    Layers of one class, sizes, dtype and device are measured once per process; the layer runs uncompiled.

    Args:
        model: just transformed.
        layers: its decoder layers.
        longest: the model's context length, in tokens.
    """
    sizes = [n for n in TOKENS if n <= longest] or [longest]
    calls = {n: record_calls(model, layers, 1, n) for n in sizes}
    for index, layer in enumerate(layers):
        info = layer.__dict__[LAYER]
        if info.prunes:
            key = _key(layer, info.config, tuple(sizes))
            if key not in _measured:
                _measured[key] = break_even({n: _ratio(layer, calls[n][index]) for n in sizes})
            info.guard_tokens = _measured[key]
            logger.info("layer %d: calls of fewer than %s tokens stay dense", index, info.guard_tokens)


def break_even(ratios: dict[int, float]) -> float:
    """Tokens from which on pruning pays.

    Args:
        ratios: tokens of a call -> time pruned / dense.

    Returns:
        The smallest size at which, and at all larger ones, the ratio is at most 1; infinity where there is none.
    """
    found = math.inf
    for tokens in sorted(ratios, reverse=True):
        if ratios[tokens] > 1:
            break
        found = tokens
    return found


def _key(layer: Any, config: Any, sizes: tuple[int, ...]) -> tuple:
    shapes = tuple((n, type(p), tuple(p.shape), p.dtype, p.device) for n, p in layer.named_parameters())
    kept = tuple((kind, state.kept_units) for kind, state in layer.states().items())
    return layer.original_class, shapes, kept, config, sizes, torch.get_num_threads()


def _ratio(layer: Any, call: Call) -> float:
    """Time of a layer's call pruned over the same call dense: medians of interleaved runs."""
    run = _runner(layer, call)
    times: dict[bool, list[float]] = {True: [], False: []}
    info = layer.__dict__[LAYER]
    with put_back(layer.states().values(), mode="frozen"), put_back([info], "prunes"):
        for _ in range(1 + _REPEATS):
            for prunes in (True, False):
                info.prunes = prunes
                times[prunes].append(run())
    return statistics.median(times[True][1:]) / statistics.median(times[False][1:])


def _runner(layer: Any, call: Call) -> Callable[[], float]:
    """Seconds of one call on random hidden states, without a KV cache."""
    args, kwargs = random_call(layer, call, None)
    device = next(layer.parameters()).device

    def run() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            layer.forward(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return run
