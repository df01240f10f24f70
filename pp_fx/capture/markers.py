"""Marker ops: they stand, during capture only, for the calls that must stay run-time decisions.

`pp_fx_capture::attention` is the attention core (any implementation), `pp_fx_capture::kv_update` is
`past_key_values.update`, `pp_fx_capture::module` is a whole module that torch.export cannot see into. Attention cores
and modules are logged as sites; `clean` turns the markers into real calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface
from transformers.modeling_utils import AttentionInterface

from ..errors import CaptureError

IMPLEMENTATION = "pp_fx_capture"
"""Name under which the markers are registered with transformers' AttentionInterface and ExpertsInterface."""


@dataclass
class Site:
    """One marked call: the attention module, its plain keyword arguments and the names of its tensor ones."""

    module: Any = None
    plain: dict[str, Any] = field(default_factory=dict)
    tensor_names: tuple[str, ...] = ()


@dataclass
class ModuleSite:
    """One call of a module that stays whole.

    `leaves` are its arguments, every tensor replaced by its number; `reason` says why it stays whole.
    """

    module: nn.Module
    leaves: list[Any]
    spec: Any
    reason: str


class TensorNumber(int):
    """Stands in `ModuleSite.leaves` for a tensor: its place among the marker's inputs."""


_sites: list[Any] | None = None

_library = torch.library.Library("pp_fx_capture", "DEF")
_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor[] extra, int site) -> Tensor")
_library.define("kv_update(Tensor k, Tensor v, Tensor cached) -> (Tensor, Tensor)")
_library.define("module(Tensor[] inputs, int site) -> Tensor")


def _attention_shape(q, k, v, mask, extra, site):
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1]))


def _kv_shape(k, v, cached):
    length = cached.shape[0]  # a size of its own: the cached length is not the query length
    return tuple(x.new_empty((x.shape[0], x.shape[1], length, x.shape[3])) for x in (k, v))


for _key in ("Meta", "CompositeExplicitAutograd"):
    _library.impl("attention", _attention_shape, _key)
    _library.impl("kv_update", _kv_shape, _key)
    _library.impl("module", lambda inputs, site: inputs[0].new_empty(inputs[0].shape), _key)

ATTENTION = torch.ops.pp_fx_capture.attention.default
KV_UPDATE = torch.ops.pp_fx_capture.kv_update.default
MODULE = torch.ops.pp_fx_capture.module.default


def _marker_attention(module, query, key, value, attention_mask=None, **kwargs):
    if _sites is None:
        raise CaptureError(f"attention implementation {IMPLEMENTATION!r} is for capture only; choose another")
    tensors = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    plain = {k: v for k, v in kwargs.items() if not isinstance(v, torch.Tensor)}
    _sites.append(Site(module, plain, tuple(tensors)))
    return ATTENTION(query, key, value, attention_mask, list(tensors.values()), len(_sites) - 1), None


AttentionInterface.register(IMPLEMENTATION, _marker_attention)


def _marker_experts(module, hidden_states, *args, **kwargs):
    reason = "its experts stay dense: every token runs others of them"
    return _marker_module(module, lambda tensor: tensor, reason, (hidden_states, *args), kwargs)


ExpertsInterface.register(IMPLEMENTATION, _marker_experts)


def stay_whole(module: nn.Module, output: Callable[[Tensor], Any], reason: str) -> None:
    """Let calls of `module` become markers. `output(tensor)` is what it returns for its [B, T, H] result."""

    module.__dict__["forward"] = lambda *args, **kwargs: _marker_module(module, output, reason, args, kwargs)


def _marker_module(
    module: nn.Module, output: Callable[[Tensor], Any], reason: str, args: tuple, kwargs: dict[str, Any]
) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    numbers = iter(range(len(tensors)))
    leaves = [TensorNumber(next(numbers)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    if _sites is None:
        raise CaptureError(f"implementation {IMPLEMENTATION!r} is for capture only; choose another")
    _sites.append(ModuleSite(module, leaves, spec, reason))
    return output(MODULE(tensors, len(_sites) - 1))


class StubCache:
    """Stands for `past_key_values` during capture; only `update` is allowed."""

    cached: torch.Tensor

    def update(self, key, value, layer_idx, *args, **kwargs):
        kwargs.pop("kwargs", None)  # what the layer itself was given
        if args or kwargs:
            raise CaptureError("the layer passes extra arguments to the KV cache's update; it cannot be captured")
        return KV_UPDATE(key, value, self.cached)

    def __getattr__(self, name: str) -> Any:
        raise CaptureError(f"the layer reads {name} of the KV cache itself; it cannot be captured")


@contextlib.contextmanager
def recording(configs: list[Any]) -> Iterator[list[Any]]:
    """Route attention and experts of modules with these configs to markers; yields the list that collects the sites."""
    global _sites
    names = ("_attn_implementation_internal", "_experts_implementation_internal")
    before = [(c, name, getattr(c, name)) for c in configs for name in names if hasattr(c, name)]
    sites: list[Any] = []
    _sites = sites
    try:
        for config, name, _ in before:
            setattr(config, name, IMPLEMENTATION)
        yield sites
    finally:
        _sites = None
        for config, name, implementation in before:
            setattr(config, name, implementation)
