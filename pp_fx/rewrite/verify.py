"""A last check of every rewritten layer: without pruning it must give what the original layer gives."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ..errors import CaptureError
from ..runtime.modes import put_back
from ..runtime.names import LAYER

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Of the largest output; 0.02 in the half-precision dtypes."""


def run_layer(layer: nn.Module, call: Any) -> list[Tensor]:
    """A layer on random hidden states, with its recorded arguments and an empty KV cache.

    Returns:
        Its output [B, T, H] and what it wrote to the cache.
    """
    # of the model's own kind, as its call left it: empty, for no layer's body has run
    found = next((leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Cache)), None)
    cache = DynamicCache() if found is None else copy.deepcopy(found)
    args, kwargs = random_call(layer, call, cache)
    with torch.no_grad():
        output: Any = layer.forward(*args, **kwargs)  # not __call__: the user's hooks must not see it
    entries: list[Any] = cache.layers
    written = [t for entry in entries for t in (entry.keys, entry.values) if isinstance(t, Tensor)]
    return [output if isinstance(output, Tensor) else output[0], *written]


def run_layers(layers: nn.ModuleList, calls: list[Any]) -> list[list[Tensor]]:
    """`run_layer` of every original layer.

    Raises:
        CaptureError: a layer does not run on its own.
    """
    found = []
    for i, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        try:
            found.append(run_layer(layer, call))
        except Exception as error:  # whatever a layer raises that needs more than its arguments
            raise CaptureError(
                f"layer {i} ({type(layer).__name__}) does not run on its own ({_first_line(error)}), so it cannot be "
                "compared with its graph; this model cannot be transformed"
            ) from error
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def random_call(layer: nn.Module, call: Any, cache: Cache | None) -> tuple[tuple, dict[str, Any]]:
    """A recorded call with random hidden states of the layer's dtype and device, and with `cache` as its KV cache."""
    weight = next(p for p in layer.parameters() if p.is_floating_point())
    args, kwargs = pytree.tree_map_only(Cache, lambda _: cache, call)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(weight.device), (args, kwargs))
    hidden = args[0] if args else kwargs["hidden_states"]
    random = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    return ((random, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": random})


def compare_layers(layers: nn.ModuleList, calls: list[Any], expected: list[list[Tensor]]) -> None:
    """Run the rewritten layers without pruning and compare.

    Raises:
        CaptureError: a layer gives something else than it did before (it computes with what a graph cannot hold).
    """
    with put_back([layer.__dict__[LAYER] for layer in layers], prunes=False, shards=None):
        for i, layer in enumerate(layers):
            try:
                got = run_layer(layer, calls[i])
            except Exception as error:  # whatever a graph that does not fit the layer raises
                raise CaptureError(
                    f"the captured graph of layer {i} does not run ({_first_line(error)}); this model cannot be "
                    "transformed"
                ) from error
            if len(got) != len(expected[i]) or not all(map(_close, got, expected[i])):
                raise CaptureError(
                    f"the captured graph of layer {i} ({type(layer).__name__}) does not give what the layer gives: it "
                    "depends on something that capture does not see (in-place changes of views, its own index, "
                    "arguments that differ between layers, ..); this model cannot be transformed"
                )


def _close(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape or not expected.numel():
        return got.shape == expected.shape
    scale = float(expected.abs().nan_to_num().max().clamp(min=1e-6))
    tolerance = _TOLERANCE.get(expected.dtype, 0.02) * scale
    return torch.allclose(got, expected, rtol=0, atol=tolerance, equal_nan=True)
