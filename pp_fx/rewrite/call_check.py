"""The look at a call before the layers run: refuse what cannot be served, see to the selections on the KV cache.

Once per forward of the model; `runtime.plan.plan_call` then decides for every block.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..config import ProbePruningConfig
from ..errors import StateError
from ..runtime.names import MODEL, STEP
from ..runtime.plan import LayerInfo
from ..runtime.selections import Selections, forget, put_selections, selections_on
from ..runtime.state import states_of
from .bypassed import Inside, check_dropout, check_inside
from .engine_calls import engine_step, is_engine_call
from .packed_rows import check_packed


class ModelInfo(NamedTuple):
    """What `check_call` knows of the model.

    Attributes:
        layer: what the first of the layers knows; it owns the configuration.
        prunes: whether any layer drops anything.
        inside: the modules that the layers' graphs bypass.
        heads: whether any layer prunes attention heads.
        unsplit: a layer whose MLP cannot run a part of a step's tokens pruned, in words; None where all can.
        guarded: whether the guard may leave a prompt dense in any layer.
        pruning: what the layers know that prune prompts.
    """

    layer: LayerInfo
    prunes: bool
    inside: Inside
    heads: bool
    unsplit: str | None
    guarded: bool = False
    pruning: tuple[LayerInfo, ...] = ()

    @property
    def settings(self) -> ProbePruningConfig:
        """Of all layers."""
        return self.layer.settings


def check_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the module that holds the layers: refuse what cannot be served, look at the KV cache.

    Returns:
        Of a step of continuous batching the arguments, with the step among those that the layers get; else None.

    Raises:
        ConfigError: of continuous batching, what `engine_step.check_settings` refuses.
        StateError: the layers were changed since `transform`, dropout was asked for, gradient checkpointing would
            select a second time, torch.jit.trace, a step of continuous batching is compiled or recorded or its MLPs
            cannot be split, the row holds several sequences (`packed_rows`), or the cache holds tokens and the
            selections of another transform, or is reserved for another one or another batch size.
    """
    info: ModelInfo = module.__dict__[MODEL]
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise StateError(
            "torch.jit.trace would record one prompt's selection for all others; use torch.compile, torch.export by "
            "pp_fx.export.onnx, or trace pp_fx.restore(model)"
        )
    check_inside(info.inside)
    if module.training:
        check_dropout(info.inside)
    if not info.prunes:
        return None
    if is_engine_call(kwargs):
        return args, {**kwargs, STEP: engine_step(info.layer, info.unsplit, _shape(args, kwargs), kwargs)}
    twice = module.training and torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False)
    if twice and any(state.prunes and state.mode == "run" for state in states_of(module)):
        raise StateError(
            "gradient checkpointing runs every layer a second time, when the history has moved on and selects "
            "otherwise; call model.gradient_checkpointing_disable(), or train under pp_fx.history_frozen(model)"
        )
    check_packed(info.settings, info.heads, module, kwargs)
    _check_cache(info, args, kwargs)
    _say_dense(info, module, args, kwargs)
    return None


def _say_dense(info: ModelInfo, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Of a prompt that no layer prunes by the cost model, which nobody asked for: once, and not inside a compiler."""
    if info.settings.guard is not None or not info.guarded or torch.compiler.is_compiling():
        return
    batch, length = _shape(args, kwargs)
    makes = kwargs.get("use_cache")
    makes = getattr(getattr(module, "config", None), "use_cache", False) if makes is None else makes
    cached = kwargs.get("past_key_values") is not None or makes  # the model makes a cache of its own
    if length >= info.settings.min_select_tokens and all(i.too_small(batch * length, cached) for i in info.pruning):
        least = min(i.guard_tokens for i in info.pruning)
        warnings.warn(
            f"a call of fewer than {least} tokens runs dense: by the cost model deciding would take longer than it "
            "saves (pp_fx.explain shows it by layer); set guard=False to prune every call",
            stacklevel=2,
        )


def _check_cache(info: ModelInfo, args: tuple, kwargs: dict[str, Any]) -> None:
    """Drop what an emptied cache holds, refuse a foreign one, and note that the cache is the caller's."""
    given = (kwargs.get("past_key_values"), kwargs.get("cache"), *args)
    cache = next((c for c in given if isinstance(c, Cache)), None)
    if cache is None:
        return
    selections, (batch, length) = selections_on(cache), _shape(args, kwargs)
    if selections is not None and selections.reserved is not None:
        _check_reserved(info, selections, batch)
    mine = selections is not None and selections.owner == info.layer.owner
    if not mine or length < info.settings.min_select_tokens or info.guarded:
        _check_held(info, cache, selections)  # others select anew, and a look at a device's number would wait for it
    selections = put_selections(cache, info.layer.owner)
    selections.given = True
    if mine and info.settings.reprobes:
        _count(selections, batch, length, info.settings)


def _check_reserved(info: ModelInfo, selections: Selections, batch: int) -> None:
    remedy = "call pp_fx.cache.reserve(model, cache, batch) again"
    if selections.owner != info.layer.owner:
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
        silent = info.guarded or info.settings.steps  # no selection is missing
        if not empty and not torch.compiler.is_compiling() and not silent:
            warnings.warn(
                "past_key_values holds tokens but no selection of pp_fx (it comes from an untransformed model); the "
                "present call's tokens select",
                stacklevel=2,
            )
    elif empty:
        forget(cache)
    elif selections.owner != info.layer.owner:
        raise StateError(
            "past_key_values holds tokens and the selections of another model or of another pp_fx.transform of this "
            "one; start with a new cache, or reset this one"
        )


def _shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """B and T of the call's token ids [B, T] or embeddings [B, T, H]; zeros where the model will ask for them."""
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    tokens = next((t for t in given if isinstance(t, Tensor)), None)
    return (0, 0) if tokens is None else (tokens.shape[0], tokens.shape[1])


def _count(selections: Selections, batch: int, length: int, settings: ProbePruningConfig) -> None:
    """Count the tokens since the last probe; a batch of another size starts the windows of tokens anew."""
    if selections.batch != batch:
        selections.batch, selections.age = batch, 0
        if any(len(window) != batch for groups in selections.windows.values() for window in groups.values()):
            selections.windows.clear()
    selections.age = 0 if length >= settings.min_select_tokens else selections.age + length
    selections.reprobes = selections.age >= settings.reprobe_every
    if selections.reprobes:
        selections.age = 0
