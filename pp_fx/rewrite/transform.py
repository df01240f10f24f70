"""`transform` and `restore`: rewrite a model's decoder layers, and undo it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..capture.layers import find_layers, structure_key
from ..capture.reads import Reads
from ..config import Kind, ProbePruningConfig
from ..groups.group import AttentionGroup, Group
from ..kernels.native_kernels import native
from ..process_settings import own_defaults
from ..ranks import agreed
from ..runtime.names import LAYER, MODEL
from ..runtime.plan import LayerInfo
from ..runtime.state import GroupState
from ..shards import is_distributed
from .break_even import TOKENS, set_guard
from .bypassed import Inside, refuse_hooks
from .call_check import ModelInfo, check_call
from .cost_model import set_guard_by_model
from .engine_calls import unsplit
from .layer import ProbePrunedLayer, input_reach, install, layers_of, output_weight, uninstall
from .refusals import (
    check_model,
    collects_attention,
    refuse_attention_weights,
    refuse_router_logits,
    warn_dense,
    warn_odd,
    warn_slow_steps,
)
from .structures import Structure, find_structures
from .tensor_parallel import as_local, check_same, check_shards, find_shards
from .verify import compare_layers, run_layers
from .widths import carried_ratios, device_of, kept_units, limit_compact, on_device, step_units

SHADOWED: dict[str, Callable[..., Any]] = {}
"""Methods that a transformed model has in place of its class's, by name: (model, ..). Integrations put theirs here."""
_HOOKS = (check_call, refuse_router_logits, refuse_attention_weights)
_owners = itertools.count(1)


@own_defaults()
def transform(model: nn.Module, config: ProbePruningConfig | dict | None = None) -> nn.Module:
    """Rewrite the decoder layers of a model in place, so that every batch runs only the heads and channels it needs.

    Method: Probe Pruning (arXiv 2502.15618). The model stays an ordinary transformers model: same class, same
    parameter names and shapes. A branch whose channels cannot be proved separable stays dense, with one warning.

    Args:
        model: a transformers causal language model in eval mode, on a real device.
        config: what to prune; `ProbePruningConfig()` by default. A dict is read by `ProbePruningConfig.from_dict`.

    Returns:
        The same object.

    Raises:
        ConfigError: `config` is invalid for this model.
        StateError: the model is already transformed, compiled, or in training mode with dropout.
        UnsupportedModelError: no decoder layers, weights on the meta device, hooks inside a layer, a layer that cannot
            be captured, or parameters that are distributed otherwise than by tensor parallelism. The model is left as
            it was.

    Of a tensor parallel model every rank makes the same call; what one of them raises, all raise.
    """
    shards = find_shards(model) if isinstance(model, nn.Module) else None
    group = None if shards is None else shards.group
    with agreed(group):
        config = check_model(model, config)
        path, layers = find_layers(model)
        for i, layer in enumerate(layers):
            refuse_hooks(i, layer)
        if shards is not None:
            check_shards(model, layers, config, shards)
    if shards is not None:
        check_same(config, shards)
    carried, settings = carried_ratios(config, len(layers)), on_device(config, model)
    stepped = config.layer_ratios("decode_ratio", len(layers)) if config.steps else [0.0] * len(layers)
    structures, calls = find_structures(model, layers, config, group)
    with agreed(group):
        with as_local(layers):
            dense = run_layers(layers, calls)
            prepared = [
                _prepare(
                    layer, structures[structure_key(layer)], {k: r[i] for k, r in carried.items()}, stepped[i], settings
                )
                for i, layer in enumerate(layers)
            ]
            limit_compact(prepared, config)
        warn_dense(model, structures.values(), {**carried, "mlp": list(map(max, carried["mlp"], stepped))})
        warn_odd(settings, model)
        warn_slow_steps(prepared)
    owner, holder = next(_owners), model.get_submodule(path.rpartition(".")[0])
    done: list[nn.Module] = []
    try:
        for i, (layer, cls, states) in enumerate(prepared):
            done.append(layer)
            info = LayerInfo(i, owner, config, settings, any(s.prunes or s.steps for s in states.values()))
            info.shards = shards
            for kind, state in states.items():
                state.shards = shards if _is_cut(layer, cls.groups[kind]) else None
            install(layer, cls, info, states)
        with agreed(group), as_local(layers):
            compare_layers(layers, calls, dense)
        if config.guard:
            set_guard(model, layers, getattr(model.config, "max_position_embeddings", None) or TOKENS[-1])
        elif config.guard is None:
            set_guard_by_model(layers, device_of(model))
        if device_of(model) == "cpu":
            native()  # compiled now, if need be, and not in the first generation
        prunes = any(state.prunes or state.steps for _, _, states in prepared for state in states.values())
        heads = any("attention" in states and states["attention"].prunes for _, _, states in prepared)
        inside = Inside.of(layers, _reads(structures.values()))
        guarded = any(layer.__dict__[LAYER].guard_tokens for layer in layers)
        infos = [layer.__dict__[LAYER] for layer in layers]
        pruning = tuple(i for i, layer in zip(infos, prepared, strict=True) if any(s.prunes for s in layer[2].values()))
        holder.__dict__[MODEL] = ModelInfo(infos[0], prunes, inside, heads, unsplit(layers), guarded, pruning)
        for name, function in SHADOWED.items():
            if hasattr(model, name):
                model.__dict__[name] = functools.partial(function, model)
        holder.register_forward_pre_hook(check_call, with_kwargs=True)
        holder.register_forward_pre_hook(refuse_router_logits, with_kwargs=True)
        model.register_forward_pre_hook(refuse_router_logits, with_kwargs=True)
        for module in () if collects_attention(holder, layers) else dict.fromkeys((model, holder)):
            module.register_forward_pre_hook(refuse_attention_weights, with_kwargs=True)
    except BaseException:
        _undo(model, [layer for layer in done if isinstance(layer, ProbePrunedLayer)])
        raise
    return model


@own_defaults()
def restore(model: nn.Module) -> nn.Module:
    """Undo `transform`: the original layers, bit for bit, with their original memory layout.

    Args:
        model: a transformed model, or a wrapper of one (torch.compile, PEFT). It is changed in place.

    Returns:
        The same object.

    Raises:
        StateError: the model is not transformed.
    """
    _undo(model, layers_of(model))
    return model


def _undo(model: nn.Module, layers: Any) -> None:
    """Whatever `transform` has done so far."""
    for layer in layers:
        uninstall(layer)
    for module in model.modules():  # of a wrapper, the model inside
        for name in (MODEL, *SHADOWED):
            module.__dict__.pop(name, None)
        hooks = module._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if hook in _HOOKS]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _reads(structures: Iterable[Structure]) -> Reads:
    """What the graphs of all structures hold the values of."""
    found: Reads = {}
    for structure in structures:
        for cls, names in structure.reads.items():
            found.setdefault(cls, set()).update(names)
    return found


def _prepare(
    layer: nn.Module, structure: Structure, ratios: dict[Kind, float], stepped: float, settings: ProbePruningConfig
) -> tuple[nn.Module, Any, dict[Kind, GroupState]]:
    """A layer, its class, and its states of these ratios."""
    states: dict[Kind, GroupState] = {}
    for kind, group in structure.groups.items():
        kept = kept_units(kind, group.units, ratios[kind], settings)
        run = step_units(group.units, stepped) if kind == "mlp" else group.units
        states[kind] = _state(layer, structure, group, kept, run, settings)
    return layer, structure.cls, states


def _is_cut(layer: nn.Module, group: Group) -> bool:
    """Whether this process holds a shard of the group's units, and not all of them."""
    return is_distributed(layer.get_parameter(group.output.path))


def _state(
    layer: nn.Module, structure: Structure, group: Group, kept: int, run: int, settings: ProbePruningConfig
) -> GroupState:
    weight = output_weight(layer, group)
    scattered = {i: p.rows for i, p in enumerate((*group.inputs, *group.whole)) if p.rows and p.range is None}
    extra: dict[str, Any] = {"reprobes": structure.reprobes[group.kind], "rows": scattered}
    extra |= {"step_units": run, "factor": structure.factors.get(group.kind)}
    extra["reach"] = input_reach(layer, group, settings)
    if isinstance(group, AttentionGroup):
        extra["kv_head"] = group.kv_head
    return GroupState(
        group.kind, group.units, group.width, kept, settings, weight, structure.probes[group.kind], **extra
    )
