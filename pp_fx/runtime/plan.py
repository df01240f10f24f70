"""What one block call does: select units anew, reuse the generation's selection, re-probe it, or run dense."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ProbePruningConfig
from ..shards import Shards
from .engine_step import EngineStep, by_history
from .names import STEP
from .selections import Selection, Selections, put_selections, selections_on


class LayerInfo:
    """What a block knows of its place. Not a module: torch.compile guards only on what a call reads.

    So without a KV cache, where `index` is not read, all layers share one compiled block.

    Attributes:
        index: of the layer in the model and in the KV cache.
        owner: identity of the transform (an int that no other transform of this process has).
        config: what is pruned, as it was given to `transform`.
        settings: the same with a value for everything that it leaves to the device.
        prunes: whether anything of this layer is dropped.
        version: of the layer's weights; another one when they are loaded or moved.
        guard_tokens: calls of fewer tokens (B x T) select nothing (`rewrite.cost_model`, `rewrite.break_even`); 0
            without the guard.
        shards: of a tensor parallel model, the shard that this process holds; None of a whole model.
    """

    def __init__(
        self, index: int, owner: int, config: ProbePruningConfig, settings: ProbePruningConfig, prunes: bool
    ) -> None:
        self.index = index
        self.owner = owner
        self.config = config
        self.settings = settings
        self.prunes = prunes
        self.version = 0
        self.guard_tokens: float = 0
        self.shards: Shards | None = None

    def too_small(self, tokens: int, cached: bool) -> bool:
        """Whether the guard leaves a call dense.

        Args:
            tokens: of the call, B x T.
            cached: whether it has a KV cache: what is selected for decoding, too, pays there. What was measured on
                this machine holds in any case.
        """
        if tokens >= self.guard_tokens:
            return False
        return not (cached and self.settings.guard is None and self.settings.reuses)


class Plan(NamedTuple):
    """Decided once per block call.

    Attributes:
        shape: B and T of the call.
        settings: of the layer.
        selects: the call selects anew, from its own tokens.
        reprobes: the call re-probes the last decoded tokens.
        cache: the KV cache, or None.
        stored: the selections of this layer to reuse, by group kind; a group that is not there runs dense. Of an
            engine's step those of the tokens that decode (`rolling`).
        empty: bool scalar, only where a compiled call cannot know whether a StaticCache was reset: where it is true
            the new selection counts, else the stored one.
        exports: an exported graph is being traced (torch.export, torch.onnx): sizes are symbols, one graph serves
            every length, and nothing outlives it.
        steps: the call's tokens, of an engine's step those that decode, choose the MLP's channels for themselves
            (`step`).
        engine: the step of an engine with continuous batching that this call is, if it does not run all channels of
            all tokens; else None. Where tokens run in two ways, `shape` counts those of prompts alone.
        once: the history alone selects, once and for all calls.
        keeps: the cache came from the caller, so a selection is kept as decode steps read it.
    """

    shape: tuple[int, int]
    settings: ProbePruningConfig
    selects: bool
    reprobes: bool
    cache: Any
    stored: dict[str, Selection]
    empty: Tensor | None = None
    exports: bool = False
    keeps: bool = False
    steps: bool = False
    engine: EngineStep | None = None
    once: bool = False


def exports() -> bool:
    """Whether torch.export traces: the only place that asks.

    Inside torch.compile `torch.compiler.is_exporting()` is true, always, up to torch 2.11.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def plan_call(layer: LayerInfo, hidden_states: Tensor, cache: Any, forwarded: dict[str, Any] | None = None) -> Plan:
    """The plan of a block call with hidden states [B, T, H].

    Under continuous batching the step that is among the layer's **kwargs (`forwarded`) says it.
    Without a cache every call selects. With one, a call of at least `min_select_tokens` tokens selects (a prompt, a
    long new turn, a chunk of a long prompt: keys and values are whole, so that is always legal), and so does a call
    on a cache that holds no selection. Shorter calls reuse the selection; with decode="dense" they run dense, and with
    decode="step" (or "auto", for small batches), which keeps no selection, their tokens choose for themselves. Calls
    that the guard finds too small select nothing: they reuse a selection, or run dense where there is none.
    """
    shape, settings = (hidden_states.shape[0], hidden_states.shape[1]), layer.settings
    exported = exports()
    # an exported graph knows no machine
    guarded = layer.guard_tokens > 0 and not exported
    small = guarded and layer.too_small(shape[0] * shape[1], cache is not None)
    if not layer.prunes:
        return Plan(shape, settings, False, False, cache, {}, exports=exported)
    if forwarded and STEP in forwarded:
        return _plan_step(layer, shape, forwarded[STEP])
    if cache is None:
        return Plan(shape, settings, not small, False, None, {}, exports=exported)
    if settings.steps and shape[1] < settings.min_select_tokens:
        few = settings.decode == "step" or exported or shape[0] <= (settings.step_batch or 0)
        return Plan(shape, settings, False, False, cache, {}, exports=exported, steps=few)
    selections = selections_on(cache)
    keeps = selections is not None and selections.given and not exported
    length = shape[1]
    if length >= settings.min_select_tokens and not small:  # whatever is stored: one graph for all prompts of a length
        return Plan(shape, settings, True, False, cache, {}, exports=exported, keeps=keeps)
    stored = _stored(layer, selections)
    if not stored and not small:
        return Plan(shape, settings, True, False, cache, {}, exports=exported, keeps=keeps)
    if stored and torch.compiler.is_compiling() and not exported:
        cached = cache.get_seq_length(layer.index)
        if isinstance(cached, Tensor):  # a StaticCache: `check_call` could not see whether it was reset
            if length > 1 and settings.decode != "dense":
                return Plan(shape, settings, True, False, cache, stored, cached == 0, keeps=keeps)
            torch._assert_async(cached > 0, _RESET)
    reprobes = selections is not None and selections.reprobes
    reused = {} if settings.decode == "dense" else stored
    return Plan(shape, settings, False, reprobes, cache, reused, exports=exported, keeps=keeps)


def _plan_step(layer: LayerInfo, shape: tuple[int, int], step: EngineStep) -> Plan:
    """Of a flat row [1, T]: its prompt tokens select, for this call alone, if they are enough for this layer.

    Tokens that decode go by `step.decode`.
    """
    settings, once = layer.settings, by_history(layer.settings)
    cache: Any = None
    tokens = shape[1] if step.prompts is None else step.prompts.shape[0]
    prunes = step.prunes and (once or not layer.too_small(tokens, False))
    if not prunes and step.decode == "dense":
        return Plan(shape, settings, False, False, cache, {})
    steps, stored = step.decode == "step", _stored(layer, selections_on(step.cache))
    step = step._replace(prunes=prunes)
    return Plan((1, tokens), settings, prunes, False, cache, stored, steps=steps, engine=step, once=once)


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


def lasting_tokens(settings: ProbePruningConfig) -> int:
    """For how many tokens a choice counts that the history makes for all calls to come: enough for everything."""
    return max(settings.compensation_min_tokens or 0, settings.min_select_tokens)


def new_selection(layer: LayerInfo, plan: Plan, kind: str, kept: Tensor, columns: Tensor) -> Selection:
    """A selection of these units, kept with the generation that it belongs to: in the memory of the one before."""
    if plan.cache is None or plan.settings.steps:
        return Selection(kept, columns, layer.version, exports=plan.exports)
    selections = put_selections(plan.cache, layer.owner)
    if layer.index not in selections.layers:
        selections.layers[layer.index] = {}
    groups = selections.layers[layer.index]
    if kind in groups and (groups[kind].holds or plan.empty is not None):
        groups[kind].choose(kept, columns, layer.version, plan.empty)
    else:
        groups[kind] = Selection(kept, columns, layer.version, holds=plan.keeps, exports=plan.exports)
    return groups[kind]
