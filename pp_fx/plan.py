"""What one call does: select units anew, reuse the generation's selection, re-probe it, or run dense.

`check_call` looks at the KV cache once per forward of the model, `plan_call` decides for one block.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import Selection, Selections, forget, put_selections, selections_on
from .config import ProbePruningConfig
from .errors import StateError
from .intact import Inside, check_dropout, check_inside
from .state import states_of

INFO = "pp_fx_info"
"""Attribute of the module that holds the rewritten layers: its `ModelInfo`."""


class ModelInfo(NamedTuple):
    """What `check_call` knows of the model.

    Attributes:
        owner: identity of the transform.
        config: what is pruned.
        prunes: whether any layer drops anything.
        inside: the modules that the layers' graphs bypass.
    """

    owner: int
    config: ProbePruningConfig
    prunes: bool
    inside: Inside


class LayerInfo:
    """What a block knows of its place. Not a module: torch.compile guards only on what a call reads.

    So without a KV cache, where `index` is not read, all layers share one compiled block.

    Attributes:
        index: of the layer in the model and in the KV cache.
        owner: identity of the transform (an int that no other transform of this process has).
        prunes: whether anything of this layer is dropped.
        version: of the layer's weights; another one when they are loaded or moved.
        guard_tokens: calls of fewer tokens (B x T) select nothing (`pp_fx.guard`); 0 without the guard.
    """

    def __init__(self, index: int, owner: int, config: ProbePruningConfig, prunes: bool) -> None:
        self.index = index
        self.owner = owner
        self.config = config
        self.prunes = prunes
        self.version = 0
        self.guard_tokens: float = 0


class Plan(NamedTuple):
    """Decided once per block call.

    Attributes:
        shape: B and T of the call.
        selects: the call selects anew, from its own tokens.
        reprobes: the call re-probes the last decoded tokens.
        cache: the KV cache, or None.
        stored: the selections of this layer to reuse, by group name; a group that is not there runs dense.
        empty: bool scalar, only where a compiled call cannot know whether a StaticCache was reset: where it is true
            the new selection counts, else the stored one.
        exports: an exported graph is being traced (torch.export, torch.onnx): sizes are symbols, one graph serves
            every length, and nothing outlives it.
        keeps: the cache came from the caller, so a selection is kept as decode steps read it.
    """

    shape: tuple[int, int]
    selects: bool
    reprobes: bool
    cache: Any
    stored: dict[str, Selection]
    empty: Tensor | None = None
    exports: bool = False
    keeps: bool = False


def exports() -> bool:
    """Whether torch.export traces: the only place that asks.

    Inside torch.compile `torch.compiler.is_exporting()` is true, always, up to torch 2.11.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def plan_call(layer: LayerInfo, hidden_states: Tensor, cache: Any) -> Plan:
    """The plan of a block call with hidden states [B, T, H].

    Without a cache every call selects. With one, a call of at least `min_select_tokens` tokens selects (a prompt, a
    long new turn, a chunk of a long prompt: keys and values are whole, so that is always legal), and so does a call
    on a cache that holds no selection. Shorter calls reuse the selection; with decode="dense" they run dense. Calls
    that the guard finds too small select nothing: they reuse a selection, or run dense where there is none.
    """
    shape = hidden_states.shape[0], hidden_states.shape[1]
    exported = exports()
    # an exported graph knows no machine
    guarded = layer.guard_tokens > 0 and not exported
    small = guarded and shape[0] * shape[1] < layer.guard_tokens
    if not layer.prunes:
        return Plan(shape, False, False, cache, {}, exports=exported)
    if cache is None:
        return Plan(shape, not small, False, None, {}, exports=exported)
    selections = selections_on(cache)
    keeps = selections is not None and selections.given and not exported
    length, config = shape[1], layer.config
    if length >= config.min_select_tokens and not small:  # whatever is stored: one graph for all prompts of a length
        return Plan(shape, True, False, cache, {}, exports=exported, keeps=keeps)
    stored = _stored(layer, selections)
    if not stored and not small:
        return Plan(shape, True, False, cache, {}, exports=exported, keeps=keeps)
    if stored and torch.compiler.is_compiling() and not exported:
        cached = cache.get_seq_length(layer.index)
        if isinstance(cached, Tensor):  # a StaticCache: `check_call` could not see whether it was reset
            if length > 1 and config.decode != "dense":
                return Plan(shape, True, False, cache, stored, cached == 0, keeps=keeps)
            torch._assert_async(cached > 0, _RESET)
    reprobes = selections is not None and selections.reprobes
    return Plan(
        shape, False, reprobes, cache, {} if config.decode == "dense" else stored, exports=exported, keeps=keeps
    )


_RESET = (
    "a compiled call of one token on a StaticCache that was reset cannot choose a selection; call "
    "pp_fx.cache.forget(cache) after cache.reset(), or run the prompt's first call without torch.compile"
)


def _stored(layer: LayerInfo, selections: Selections | None) -> dict[str, Selection]:
    if selections is None:
        return {}
    groups = selections.layers.get(layer.index, {})
    if any(not s.current or s.version != layer.version for s in groups.values()):
        return {}  # the cache was emptied, or the weights changed since
    return groups


def new_selection(layer: LayerInfo, plan: Plan, name: str, kept: Tensor, columns: Tensor) -> Selection:
    """A selection of these units, kept with the generation that it belongs to: in the memory of the one before."""
    if plan.cache is None:
        return Selection(kept, columns, layer.version)
    selections = put_selections(plan.cache, layer.owner)
    if layer.index not in selections.layers:
        selections.layers[layer.index] = {}
    groups = selections.layers[layer.index]
    if name in groups and (groups[name].holds or plan.empty is not None):
        groups[name].choose(kept, columns, layer.version, plan.empty)
    else:
        groups[name] = Selection(kept, columns, layer.version, plan.keeps)
    groups[name].exports = plan.exports
    return groups[name]


def check_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the module that holds the layers: refuse what cannot be served, look at the KV cache.

    Raises:
        StateError: the layers were changed since `transform`, dropout was asked for, gradient checkpointing would
            select a second time, torch.jit.trace, generate_batch's paged cache, or the cache holds tokens and the
            selections of another transform, or is reserved for another one or another batch size.
    """
    info: ModelInfo = module.__dict__[INFO]
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise StateError(
            "torch.jit.trace would record one prompt's selection for all others; use torch.compile, torch.export by "
            "pp_fx.export.onnx, or trace pp_fx.restore(model)"
        )
    check_inside(info.inside)
    if module.training:
        check_dropout(info.inside)
    if not info.prunes:
        return
    if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
        raise StateError(
            "generate_batch (continuous batching) cannot be served by a transformed model: one selection holds for a "
            "batch from its prompt on, and there requests come and go; use generate, or call pp_fx.restore(model)"
        )
    twice = module.training and torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False)
    if twice and any(state.prunes and state.mode == "run" for state in states_of(module)):
        raise StateError(
            "gradient checkpointing runs every layer a second time, when the history has moved on and selects "
            "otherwise; call model.gradient_checkpointing_disable(), or train under pp_fx.history_frozen(model)"
        )
    _check_cache(info, args, kwargs)


def _check_cache(info: ModelInfo, args: tuple, kwargs: dict[str, Any]) -> None:
    """Drop what an emptied cache holds, refuse a foreign one, and note that the cache is the caller's."""
    given = (kwargs.get("past_key_values"), kwargs.get("cache"), *args)
    cache = next((c for c in given if isinstance(c, Cache)), None)
    if cache is None:
        return
    selections, (batch, length) = selections_on(cache), _shape(args, kwargs)
    if selections is not None and selections.reserved is not None:
        _check_reserved(info, selections, batch)
    mine = selections is not None and selections.owner == info.owner
    if not mine or length < info.config.min_select_tokens or info.config.guard:
        _check_held(info, cache, selections)  # others select anew, and a look at a device's number would wait for it
    selections = put_selections(cache, info.owner)
    selections.given = True
    if mine and info.config.reprobes:
        _count(selections, batch, length, info.config)


def _check_reserved(info: ModelInfo, selections: Selections, batch: int) -> None:
    remedy = "call pp_fx.cache.reserve(model, cache, batch) again"
    if selections.owner != info.owner:
        raise StateError(
            f"past_key_values is reserved for another model or another pp_fx.transform of this one; {remedy}"
        )
    if batch != selections.reserved:
        raise StateError(
            f"past_key_values is reserved for batch={selections.reserved}, the call has {batch} sequences; {remedy}"
        )


def _check_held(info: ModelInfo, cache: Cache, selections: Selections | None) -> None:
    filled = cache.get_seq_length()
    known = not (isinstance(filled, Tensor) and torch.compiler.is_compiling())
    empty = known and bool(filled == 0)
    if selections is None:
        if not empty and not torch.compiler.is_compiling() and not info.config.guard:
            warnings.warn(
                "past_key_values holds tokens but no selection of pp_fx (it comes from an untransformed model); the "
                "present call's tokens select",
                stacklevel=2,
            )
    elif empty:
        forget(cache)
    elif selections.owner != info.owner:
        raise StateError(
            "past_key_values holds tokens and the selections of another model or of another pp_fx.transform of this "
            "one; start with a new cache, or reset this one"
        )


def _shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """B and T of the call's token ids [B, T] or embeddings [B, T, H]; zeros where the model will ask for them."""
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    tokens = next((t for t in given if isinstance(t, Tensor)), None)
    return (0, 0) if tokens is None else (tokens.shape[0], tokens.shape[1])


def _count(selections: Selections, batch: int, length: int, config: ProbePruningConfig) -> None:
    """Count the tokens since the last probe; a batch of another size starts the windows of tokens anew."""
    if selections.batch != batch:
        selections.batch, selections.age = batch, 0
        if any(len(window) != batch for groups in selections.windows.values() for window in groups.values()):
            selections.windows.clear()
    selections.age = 0 if length >= config.min_select_tokens else selections.age + length
    selections.reprobes = selections.age >= config.reprobe_every
    if selections.reprobes:
        selections.age = 0
