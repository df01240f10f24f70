"""Where the time of a pruned call goes: probe, selection, compensation, history, gathers, and the rest.

Uncompiled: a compiler fuses the parts into one another. The functions that a block's graph calls are timed in place.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..rewrite.layer import layers_of
from ..runtime import compensate, gather, head_gram, history, probe, select

_PARTS: dict[Callable[..., Any], str] = {
    **dict.fromkeys((probe.probe_source, probe.choose_rows, probe.take_rows, probe.take_samples), "probe"),
    **dict.fromkeys((probe.query_mask, probe.probe_mask, probe.probe_state), "probe"),
    **dict.fromkeys(
        (head_gram.probe_gram, head_gram.output_gram, select.unit_scores, select.choose_units), "selection"
    ),
    compensate.compensate: "compensation",
    history.update_history: "history",
    gather.gather_vector: "gather",
    gather.gather_heads: "gather",
}
_INSIDE = ("_rows", "_kept_columns")
"""Functions of `pp_fx.runtime.gather` that copy weights; what is around them multiplies."""


def time_shares(model: nn.Module, ids: Tensor, repeats: int = 3) -> dict[str, float]:
    """Share of each part in the time of the decoder blocks of an uncompiled prefill.

    Args:
        model: a transformed model; its history changes as by any prefill, unless it is frozen.
        ids: int64 [B, T].
        repeats: calls that are measured, after one that is not.

    Returns:
        "probe", "selection" (score, top-k), "compensation", "history" and "gather" (copies of kept weights), each as
        a share of the whole call; what is left are the branches' own products, norms and attention. CPU time of the
        calling thread, wall time with the device waited for on CUDA.

    Raises:
        StateError: the model is not transformed.
    """
    spent: dict[str, float] = defaultdict(float)
    clock = _clock(ids.device)
    body: Any = model.base_model
    with torch.no_grad(), _timed(model, spent, clock):
        body(input_ids=ids, use_cache=False)
        spent.clear()
        start = clock()
        for _ in range(repeats):
            body(input_ids=ids, use_cache=False)
        whole = clock() - start
    return {part: spent[part] / whole for part in ("probe", "selection", "compensation", "history", "gather")}


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return time.thread_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


@contextlib.contextmanager
def _timed(model: nn.Module, spent: dict[str, float], clock: Callable[[], float]) -> Iterator[None]:
    """Inside, calls of the parts add to `spent`; of nested parts each has its own time alone."""
    inner: list[float] = []

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            start = clock()
            result = function(*args, **kwargs)
            lasted = clock() - start
            spent[part] += lasted - inner.pop()
            if inner:
                inner[-1] += lasted
            return result

        return call

    changed: list[tuple[dict[str, Any], str, Any]] = []
    forwards = (inspect.unwrap(type(layer).forward) for layer in layers_of(model))  # transformers wraps it
    for namespace in {id(f.__globals__): f.__globals__ for f in forwards}.values():
        for name, value in namespace.items():
            part = _PARTS.get(value) if callable(value) and getattr(value, "__hash__", None) else None
            if part is not None:
                changed.append((namespace, name, timed(value, part)))
    changed += [(vars(gather), name, timed(getattr(gather, name), "gather")) for name in _INSIDE]
    before = [(namespace, name, namespace[name]) for namespace, name, _ in changed]
    try:
        for namespace, name, value in changed:
            namespace[name] = value
        yield
    finally:
        for namespace, name, value in before:
            namespace[name] = value
