"""`transform`, `restore`, `is_transformed`: rewrite a model's decoder layers, and undo it."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from . import runtime
from .block import ProbePrunedLayer, install, output_weight, uninstall
from .capture import find_layers, structure_key
from .config import ProbePruningConfig, as_config
from .defaults import own_defaults
from .errors import StateError, UnsupportedModelError
from .exported import LAYER
from .groups import AttentionGroup, Group
from .guard import TOKENS, set_guard
from .intact import Inside, refuse_hooks
from .plan import INFO, LayerInfo, ModelInfo, check_call
from .reads import Reads
from .state import GroupState
from .structure import Structure, find_structures
from .verify import compare_layers, run_layers

logger = logging.getLogger(__name__)
SAVE = "save_pretrained"
"""Attribute of a transformed model that shadows its class's method (`pp_fx.saving`)."""
_owners = itertools.count(1)


def is_transformed(model: nn.Module) -> bool:
    """Whether `transform` has rewritten this model.

    Args:
        model: any module; of a wrapper (torch.compile, PEFT) the model inside counts.
    """
    return any(isinstance(m, ProbePrunedLayer) for m in model.modules())


def layers_of(model: nn.Module) -> list[Any]:
    """The rewritten decoder layers of a transformed model, in order.

    Raises:
        StateError: the model is not transformed.
    """
    layers = [m for m in model.modules() if isinstance(m, ProbePrunedLayer)]
    if not layers:
        raise StateError(f"model={type(model).__name__} is not transformed; call pp_fx.transform(model) first")
    return layers


def config_of(model: nn.Module) -> ProbePruningConfig:
    """What a transformed model (or the one inside a wrapper) prunes.

    Raises:
        StateError: the model is not transformed.
    """
    return layers_of(model)[0].__dict__[LAYER].config


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
        UnsupportedModelError: no decoder layers, weights on the meta device or distributed, hooks inside a layer, or a
            layer that cannot be captured. The model is left as it was.
    """
    config = _check(model, config)
    path, layers = find_layers(model)
    for i, layer in enumerate(layers):
        refuse_hooks(i, layer)
    carried, chosen = carried_ratios(config, len(layers)), on_device(config, model)
    structures, calls = find_structures(model, layers, config)
    dense = run_layers(layers, calls)
    _warn_dense(model, structures.values(), carried)
    prepared = []
    for i, layer in enumerate(layers):
        structure = structures[structure_key(layer)]
        states = {}
        for kind, group in structure.groups.items():
            states[kind] = _state(layer, structure, group, kept_units(group, carried[kind][i], chosen), chosen)
        prepared.append((layer, structure.cls, states))
    _limit_compact(prepared, config)
    _warn_odd(chosen, model)
    owner, holder = next(_owners), model.get_submodule(path.rpartition(".")[0])
    done: list[nn.Module] = []
    try:
        for i, (layer, cls, states) in enumerate(prepared):
            done.append(layer)
            install(layer, cls, LayerInfo(i, owner, config, any(s.prunes for s in states.values())), states)
        compare_layers(layers, calls, dense)
        if config.guard:
            set_guard(model, layers, getattr(model.config, "max_position_embeddings", None) or TOKENS[-1])
        prunes = any(state.prunes for _, _, states in prepared for state in states.values())
        holder.__dict__[INFO] = ModelInfo(owner, config, prunes, Inside.of(layers, _reads(structures.values())))
        if hasattr(model, SAVE):
            model.__dict__[SAVE] = functools.partial(_save_pretrained, model)
        holder.register_forward_pre_hook(check_call, with_kwargs=True)
        holder.register_forward_pre_hook(_refuse_router_logits, with_kwargs=True)
        model.register_forward_pre_hook(_refuse_router_logits, with_kwargs=True)
        for module in () if _collects_attention(holder, layers) else dict.fromkeys((model, holder)):
            module.register_forward_pre_hook(_refuse_attention_weights, with_kwargs=True)
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
        module.__dict__.pop(INFO, None)
        module.__dict__.pop(SAVE, None)
        hooks = module._forward_pre_hooks
        for key in [
            k for k, hook in hooks.items() if hook in (_refuse_attention_weights, _refuse_router_logits, check_call)
        ]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def carried_ratios(config: ProbePruningConfig, layers: int) -> dict[str, list[float]]:
    """Group kind -> the ratio that each layer carries."""
    return {kind: config.layer_ratios(f"{kind}_ratio", layers) for kind in ("mlp", "attention")}


def on_device(config: ProbePruningConfig, model: nn.Module) -> ProbePruningConfig:
    """The configuration with the values that the model's device takes for what it leaves open."""
    return config.on(next((p.device.type for p in model.parameters()), "cpu"))


def kept_units(group: Group, ratio: float, config: ProbePruningConfig) -> int:
    """How many channels (rounded up to a multiple of `round_to`) or heads of a group run at a per-layer ratio."""
    kept = group.units - int(ratio * group.units)
    if group.kind == "mlp" and ratio > 0:
        multiple = config.round_to or 1
        kept = min(group.units, -(-kept // multiple) * multiple)
    return kept


def _reads(structures: Iterable[Structure]) -> Reads:
    """What the graphs of all structures hold the values of."""
    found: Reads = {}
    for structure in structures:
        for cls, names in structure.reads.items():
            found.setdefault(cls, set()).update(names)
    return found


def _limit_compact(prepared: list[tuple], config: ProbePruningConfig) -> None:
    """Layers from the first on may hold compact weights while decoding, up to the configured limit."""
    left = math.inf if config.compact_megabytes is None else config.compact_megabytes * 2**20
    for layer, cls, states in prepared:
        for kind, state in states.items():
            size = _compact_size(layer, cls.groups[kind], state.kept_units)
            state.holds_compact = state.holds_compact and state.prunes and size <= left
            left -= size if state.holds_compact else 0


def _compact_size(layer: nn.Module, group: Group, kept: int) -> float:
    """Bytes of the compact weights: kept units of the pruned projections, and fused ones that run whole."""
    shares = [(p, p.share * kept / group.units) for p in (*group.inputs, group.output)]
    shares += [(p, p.share) for p in group.whole]
    weights = [(layer.get_parameter(p.path), share) for p, share in shares]
    return sum(w.numel() * w.element_size() * share for w, share in weights)


def _save_pretrained(model: nn.Module, save_directory: Any, **kwargs: Any) -> None:
    from .saving import save_pretrained  # it stands on this module

    save_pretrained(model, save_directory, **kwargs)


def _collects_attention(holder: nn.Module, layers: Iterable[Any]) -> bool:
    """Whether output_attentions can be served: all heads run, through the attention core or their own module."""
    cores = {runtime.attention, runtime.pruned_attention, runtime.call_module}
    whole = all(not s.prunes for layer in layers for kind, s in layer.states().items() if kind == "attention")
    seen = all(any(node.target in cores for node in layer.graph.nodes) for layer in layers)
    return whole and seen and "attentions" in (getattr(holder, "_can_record_outputs", None) or {})


def _asks(model: nn.Module, kwargs: dict[str, Any], output: str) -> bool:
    """Whether a call, or else the model's configuration, asks for an output."""
    asked = kwargs.get(output)
    return bool(getattr(getattr(model, "config", None), output, False) if asked is None else asked)


def _refuse_attention_weights(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The rewritten layers do not call the attention modules, whose outputs transformers would collect."""
    if _asks(model, kwargs, "output_attentions"):
        raise StateError(
            "output_attentions=True cannot be served: attention heads are pruned, or this model's attention is not one "
            "call; leave it out, set attention_ratio=0, or call pp_fx.restore(model)"
        )


def _refuse_router_logits(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A graph runs the routers of a mixture without calling their modules."""
    if _asks(model, kwargs, "output_router_logits"):
        raise StateError(
            "output_router_logits=True cannot be served by a transformed model; set it to False or call "
            "pp_fx.restore(model)"
        )


def _check(model: nn.Module, config: Any) -> ProbePruningConfig:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model={model!r} is no torch.nn.Module; load one with AutoModelForCausalLM")
    config = as_config(config)
    if is_transformed(model):
        raise StateError("model is already transformed; call pp_fx.restore(model) first")
    if hasattr(model, "_orig_mod"):  # torch.compile does not look again at hooks and settings
        raise StateError("model is compiled; transform the model itself, then compile: torch.compile(transform(model))")
    meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise UnsupportedModelError(f"parameter {meta} is on the meta device; load the weights before transform")
    sharded = next((n for n, p in model.named_parameters() if hasattr(p, "device_mesh")), None)  # a DTensor
    if sharded is not None:
        raise UnsupportedModelError(
            f"parameter {sharded} is distributed (tensor parallel, FSDP), and a selection would have to be made over "
            "all shards; load the whole model on every rank: pp_fx.calibrate and evaluate share batches between ranks"
        )
    if model.training and _has_dropout(model):
        raise StateError("model is in training mode with dropout; call model.eval() before transform")
    return config


def _has_dropout(model: nn.Module) -> bool:
    layers = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    return layers or bool(getattr(getattr(model, "config", None), "attention_dropout", 0))


def _warn_odd(config: ProbePruningConfig, model: nn.Module) -> None:
    on_cuda = any(p.is_cuda for p in model.parameters())
    if on_cuda and config.round_to is not None and config.round_to % 8:
        warnings.warn(
            f"round_to={config.round_to} keeps counts that are no multiple of 8; on CUDA their products are slower "
            "than those of all channels: leave round_to out, or give a multiple of 8",
            stacklevel=3,
        )


def _warn_dense(model: nn.Module, structures: Any, carried: dict[str, list[float]]) -> None:
    adapted = any(hasattr(m, "base_layer") and hasattr(m, "merge") for m in model.modules())
    remedy = "; merge the adapters first (PEFT: model.merge_and_unload())" if adapted else ""
    for kind, ratios in carried.items():
        without = [s for s in structures if kind not in s.groups]
        if any(ratios) and without:
            reasons = "; ".join(dict.fromkeys(r for s in without for r in s.reasons))
            warnings.warn(f"pp_fx leaves {kind} dense in some layers: {reasons}{remedy}", stacklevel=3)
    asked = [kind for kind, ratios in carried.items() if any(ratios)]
    if asked and not any(kind in s.groups for kind in asked for s in structures):
        other = [kind for kind in carried if kind not in asked and any(kind in s.groups for s in structures)]
        remedy = "".join(f"; {kind} can be pruned here, set {kind}_ratio" for kind in other)
        warnings.warn(f"pp_fx prunes nothing of this model{remedy}", stacklevel=3)


def _state(layer: nn.Module, structure: Structure, group: Group, kept: int, config: ProbePruningConfig) -> GroupState:
    weight = output_weight(layer, group)
    scattered = {i: p.rows for i, p in enumerate((*group.inputs, *group.whole)) if p.rows and p.range is None}
    extra: dict[str, Any] = {"reprobes": structure.reprobes[group.kind], "rows": scattered}
    if isinstance(group, AttentionGroup):
        extra["kv_head"] = group.kv_head
    return GroupState(group.kind, group.units, group.width, kept, config, weight, structure.probes[group.kind], **extra)
