"""Time of a pruned model against the dense one: interleaved in one process, medians, CPU time and wall time."""

from __future__ import annotations

import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from ..calibration.calibrate import calibrate
from ..checks import check_choice, check_integers, check_token_ids
from ..config import ProbePruningConfig, as_config
from ..errors import InputError
from ..rewrite.transform import transform
from ..runtime.modes import history_frozen
from ..runtime.selections import compact_bytes
from ..shards import check_whole
from .bounds import static_copies
from .bytes import block_bytes, head_weight, key_value_bytes
from .macs import attention_core_macs, count_macs, kept_head_share
from .time_shares import time_shares

_WARM_UP = 3
_RUN = 8
"""Decode steps of one model before the other's turn: in use, too, a model finds the processor's caches its own."""


@dataclass
class _Clock:
    """Milliseconds of every repeat, by clock. On a CUDA device the device is waited for."""

    device: torch.device
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def run(self, call: Callable[[], Any]) -> Any:
        self._wait()
        wall, cpu = time.perf_counter(), time.thread_time()
        result = call()
        self._wait()
        self.cpu.append(1000 * (time.thread_time() - cpu))
        self.wall.append(1000 * (time.perf_counter() - wall))
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        self.cpu.clear()
        self.wall.clear()

    def median(self, clock: str) -> float:
        return statistics.median(getattr(self, clock))


class _Side:
    """One of the two models: its decoder blocks (embedding, mask and last norm included), and the LM head."""

    def __init__(self, model: Any, compiled: bool, freezing: bool = False) -> None:
        self.model = model
        self.head: Any = model.get_output_embeddings()
        self.body: Any = model.base_model
        if compiled:
            self.body = torch.compile(self.body, fullgraph=True, options={"freezing": True} if freezing else None)
        device = self.head.weight.device
        self.blocks, self.with_head = _Clock(device), _Clock(device)

    def step(self, **inputs: Any) -> Tensor:
        """One timed call; the greedy next tokens [B, 1]."""
        hidden = self.blocks.run(lambda: self.body(**inputs).last_hidden_state)
        logits = self.with_head.run(lambda: self.head(hidden[:, -1:]))
        for clock in ("cpu", "wall"):
            getattr(self.with_head, clock)[-1] += getattr(self.blocks, clock)[-1]
        return logits.argmax(-1)


def bench(
    model: nn.Module,
    ids: Tensor,
    config: ProbePruningConfig | dict | None = None,
    *,
    phase: str = "prefill",
    new_tokens: int = 32,
    compiled: bool = False,
    freezing: bool = False,
    repeats: int = 9,
    threads: int = 1,
    progress: Callable[[Any, str], Any] = lambda items, label: items,
) -> dict[str, Any]:
    """Measure a dense model against a pruned copy of it.

    Dense and pruned calls alternate (decode steps in runs of 8), so that a busy machine hits both. The gate is CPU
    time of one thread (`time.thread_time`): on busy cores wall time of several threads says little. Nothing of `model`
    changes.

    Args:
        model: an untransformed causal language model in eval mode.
        ids: int64 [B, T], the prompts; the history is calibrated on them and frozen.
        config: what to prune, as in `pp_fx.transform`.
        phase: "prefill" (no KV cache, all positions through the blocks, the LM head on the last) or "decode"
            (`new_tokens` greedy steps after the prompts; DynamicCache, StaticCache when compiled).
        new_tokens: decode steps.
        compiled: torch.compile the blocks, `fullgraph=True`.
        freezing: compile all sides with Inductor's `freezing`, which packs the weights for the CPU: on some processors
            the fastest dense model at few rows. Weights must not change afterwards.
        repeats: timed calls of each side (prefill).
        threads: torch.set_num_threads, put back afterwards.
        progress: wraps the loop, for example rich.progress.track.

    Returns:
        `dense_ms`, `pruned_ms`, `ratio` (decoder blocks without the LM head, median CPU time; wall time on CUDA),
        `ideal` (MACs for prefill, bytes read for decode), `ideal_with_probe` (prefill: probe and compensation counted
        too), `static_ratio` (the same kept channels cut out of the weights once: what no pruning that decides while it
        runs can beat) and `masked_ratio` (whole weights, the dropped channels set to zero), both None where heads are
        pruned, each token chooses for itself, or weights are fused or with biases, `shares` (prefill: see
        `measure.time_shares`), `wall` and `with_head` with the same figures, `first_step_ms` (decode: the step that
        gathers the compact weights), `compact_mb`,
        `peak_memory_mb` of the process.

    Raises:
        InputError: the ids, the phase or a number cannot be used.
    """
    check_whole(model, "bench")
    check_choice("phase", phase, ("prefill", "decode"))
    check_integers(1, new_tokens=new_tokens, repeats=repeats, threads=threads)
    if freezing and not compiled:
        raise InputError("freezing=True is an option of the compiler; set compiled=True too (--compile)")
    check_token_ids(model, ids, "ids")
    config = as_config(config)
    with _threads(threads):  # the guard measures, too
        pruned = transform(copy.deepcopy(model), config)
    calibrate(pruned, ids, batch_size=len(ids), progress=False)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = ids.to(device)
    with _threads(threads), torch.no_grad(), history_frozen(pruned):
        sides = {"dense": _Side(model, compiled, freezing), "pruned": _Side(pruned, compiled, freezing)}
        by_token = phase == "decode" and config.steps  # no copy has what every token chooses for itself
        static = None if by_token else static_copies(model, pruned, ids)
        if static is not None:
            sides["static"] = _Side(static.cut, compiled, freezing)
            sides["masked"] = _Side(static.masked, compiled, freezing)
        if phase == "prefill":
            extra = _prefill(sides, ids, progress(range(_WARM_UP + repeats), "prefill"))
            extra["shares"] = time_shares(pruned, ids)
        else:
            extra = _decode(sides, ids, new_tokens, compiled, progress)
    gate = "wall" if device.type == "cuda" else "cpu"
    dense, slim = sides["dense"], sides["pruned"]
    ideals = ideal_prefill(model, pruned, ids) if phase == "prefill" else ideal_decode(model, pruned, ids, new_tokens)
    return {
        "dense_ms": dense.blocks.median(gate),
        "pruned_ms": slim.blocks.median(gate),
        "ratio": slim.blocks.median(gate) / dense.blocks.median(gate),
        **ideals["blocks"],
        **{
            f"{name}_ratio": sides[name].blocks.median(gate) / dense.blocks.median(gate) if name in sides else None
            for name in ("static", "masked")
        },
        "wall": {
            "dense_ms": dense.blocks.median("wall"),
            "pruned_ms": slim.blocks.median("wall"),
            "ratio": slim.blocks.median("wall") / dense.blocks.median("wall"),
        },
        "with_head": {
            "dense_ms": dense.with_head.median(gate),
            "pruned_ms": slim.with_head.median(gate),
            "ratio": slim.with_head.median(gate) / dense.with_head.median(gate),
            **ideals["with_head"],
        },
        **extra,
        "peak_memory_mb": peak_memory_mb(device),
        "settings": {
            "phase": phase,
            "batch": ids.shape[0],
            "length": ids.shape[1],
            "new_tokens": new_tokens if phase == "decode" else 0,
            "dtype": str(dense.head.weight.dtype).removeprefix("torch."),
            "device": device.type,
            "attention": model.config._attn_implementation,  # type: ignore[union-attr]
            "compiled": compiled,
            "freezing": freezing,
            "threads": threads,
        },
        "config": config.to_dict(),
    }


def _prefill(sides: dict[str, _Side], ids: Tensor, repeats: Any) -> dict[str, Any]:
    for index in repeats:
        for side in sides.values():
            if index == _WARM_UP:
                side.blocks.forget()
                side.with_head.forget()
            side.step(input_ids=ids, use_cache=False)
    return {}


def time_prefill(dense: nn.Module, pruned: nn.Module, ids: Tensor, repeats: int) -> float:
    """Time of the decoder blocks of `pruned` over that of `dense`: medians of interleaved prefills of ids [B, T].

    CPU time of the calling thread with one thread, wall time on CUDA; history as the caller left it.
    """
    sides = {"dense": _Side(dense, False), "pruned": _Side(pruned, False)}
    gate = "wall" if ids.is_cuda else "cpu"
    with _threads(1):
        _prefill(sides, ids, range(_WARM_UP + repeats))
    return sides["pruned"].blocks.median(gate) / sides["dense"].blocks.median(gate)


def _decode(sides: dict[str, _Side], ids: Tensor, new_tokens: int, compiled: bool, progress: Any) -> dict[str, Any]:
    caches, tokens, first = {}, {}, {}
    for name, side in sides.items():
        size = ids.shape[1] + _WARM_UP + new_tokens + 1
        config = side.model.config
        caches[name] = StaticCache(config=config, max_cache_len=size) if compiled else DynamicCache(config=config)
        hidden = side.model.base_model(input_ids=ids, past_key_values=caches[name]).last_hidden_state
        tokens[name] = side.head(hidden[:, -1:]).argmax(-1)
    for start in progress(range(0, _WARM_UP + new_tokens, _RUN), "decode"):
        for name, side in sides.items():
            for index in range(start, min(start + _RUN, _WARM_UP + new_tokens)):
                if index == _WARM_UP:
                    first[name] = side.blocks.wall[0]
                    side.blocks.forget()
                    side.with_head.forget()
                tokens[name] = side.step(input_ids=tokens[name], past_key_values=caches[name])
    return {"first_step_ms": first, "compact_mb": compact_bytes(caches["pruned"]) / 2**20}


def ideal_prefill(dense: Any, pruned: Any, ids: Tensor) -> dict[str, dict[str, float]]:
    """Share of the dense MACs that a prefill of ids [B, T] runs, without and with probe and compensation.

    Returns:
        "blocks" and "with_head" -> "ideal" and "ideal_with_probe".
    """
    batch, length = ids.shape
    macs, core = count_macs(pruned, batch, length), attention_core_macs(dense.config, length)
    kept = macs.pruned + core * kept_head_share(pruned, batch * length)
    whole, head = macs.dense + core, head_weight(dense).numel() / length
    return {
        "blocks": {"ideal": kept / whole, "ideal_with_probe": (kept + macs.overhead) / whole},
        "with_head": {
            "ideal": (kept + head) / (whole + head),
            "ideal_with_probe": (kept + macs.overhead + head) / (whole + head),
        },
    }


def ideal_decode(dense: Any, pruned: Any, ids: Tensor, new_tokens: int) -> dict[str, dict[str, float]]:
    """Share of the dense bytes (KV cache counted) that a step behind prompts ids [B, T] reads.

    Returns:
        "blocks" and "with_head" -> "ideal".
    """
    batch, length = ids.shape
    element = head_weight(dense).element_size()
    cached = key_value_bytes(dense.config, batch, length + new_tokens / 2, element)
    blocks, slim = block_bytes(pruned, batch * length, batch)
    whole, kept, head = blocks + cached, slim + cached, head_weight(dense).numel() * element
    return {
        "blocks": {"ideal": kept / whole},
        "with_head": {"ideal": (kept + head) / (whole + head)},
    }


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory in MiB: allocated on the CUDA device, else resident of this process (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # POSIX only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
