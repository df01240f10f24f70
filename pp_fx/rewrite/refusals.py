"""What `transform` and a rewritten model's calls refuse or warn of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config import Kind, ProbePruningConfig, as_config
from ..errors import ConfigError, StateError, UnsupportedModelError
from ..layouts import codes_of, is_plain
from ..runtime import model_calls
from .layer import is_transformed


def collects_attention(holder: nn.Module, layers: Iterable[Any]) -> bool:
    """Whether output_attentions can be served: all heads run, through the attention core or their own module."""
    cores = {model_calls.attention, model_calls.pruned_attention, model_calls.call_module}
    whole = all(not s.prunes for layer in layers for kind, s in layer.states().items() if kind == "attention")
    seen = all(any(node.target in cores for node in layer.graph.nodes) for layer in layers)
    return whole and seen and "attentions" in (getattr(holder, "_can_record_outputs", None) or {})


def _asks(model: nn.Module, kwargs: dict[str, Any], output: str) -> bool:
    """Whether a call, or else the model's configuration, asks for an output."""
    asked = kwargs.get(output)
    return bool(getattr(getattr(model, "config", None), output, False) if asked is None else asked)


def refuse_attention_weights(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The rewritten layers do not call the attention modules, whose outputs transformers would collect."""
    if _asks(model, kwargs, "output_attentions"):
        raise StateError(
            "output_attentions=True cannot be served: attention heads are pruned, or this model's attention is not one "
            "call; leave it out, set attention_ratio=0, or call pp_fx.restore(model)"
        )


def refuse_router_logits(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A graph runs the routers of a mixture without calling their modules."""
    if _asks(model, kwargs, "output_router_logits"):
        raise StateError(
            "output_router_logits=True cannot be served by a transformed model; set it to False or call "
            "pp_fx.restore(model)"
        )


def check_model(model: nn.Module, config: Any) -> ProbePruningConfig:
    """What `transform` is given; the configuration.

    Raises:
        ConfigError: `config` is none, or cannot be served on the model's device.
        StateError: the model is already transformed, compiled, or in training mode with dropout.
        UnsupportedModelError: no module, or weights on the meta device or packed by another library.
    """
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
    packed = next((n for n, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None), None)
    if packed is not None:
        raise UnsupportedModelError(
            f"{packed} holds its weight as compressed-tensors packs it; call pp_fx.to_torchao(model) first, on a model "
            "that was not called yet"
        )
    moved = next((p.device.type for p in model.parameters() if p.device.type != "cpu"), None)
    if config.step_probe is not None and moved is not None:
        raise ConfigError(
            f"step_probe={config.step_probe!r} has kernels for a CPU, the model is on {moved}; set it to None: then "
            "the gate itself ranks"
        )
    if model.training and _has_dropout(model):
        raise StateError("model is in training mode with dropout; call model.eval() before transform")
    return config


def _has_dropout(model: nn.Module) -> bool:
    layers = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    return layers or bool(getattr(getattr(model, "config", None), "attention_dropout", 0))


def warn_odd(config: ProbePruningConfig, model: nn.Module) -> None:
    """Warn of a `round_to` that makes products slower."""
    on_cuda = any(p.is_cuda for p in model.parameters())
    if on_cuda and config.round_to is not None and config.round_to % 8:
        warnings.warn(
            f"round_to={config.round_to} keeps counts that are no multiple of 8; on CUDA their products are slower "
            "than those of all channels: leave round_to out, or give a multiple of 8",
            stacklevel=4,
        )


_UNREAD = "unread"


def _kind_of_codes(weight: Any) -> str:
    """What kernels read a weight as."""
    if is_plain(weight):
        return "plain"
    codes = codes_of(weight)
    return _UNREAD if codes is None else "rows" if codes.zeros is None else "groups"


def warn_slow_steps(prepared: Any) -> None:
    """Warn of decode steps that save nothing, because no kernel reads the weights that a token chooses of.

    Args:
        prepared: of every layer the layer, its class and its states.
    """
    for layer, cls, states in prepared:
        if "mlp" not in states or not states["mlp"].steps:
            continue
        weights = [layer.get_parameter(path) for path in cls.groups["mlp"].weights]
        if weights[0].device.type != "cpu":
            return
        kinds = {_kind_of_codes(w): type(w).__name__ for w in weights}
        if _UNREAD in kinds or len(kinds) > 1:
            warnings.warn(
                f"decode steps that choose channels take the dense model's time: their kernels read MLPs of ordinary "
                f"weights, of int8 by row or of integers in groups alone, this one holds {', '.join(kinds.values())}; "
                "quantize all of an MLP alike, or choose decode='sticky' or 'dense'",
                stacklevel=4,
            )
            return


def warn_dense(model: nn.Module, structures: Any, carried: dict[Kind, list[float]]) -> None:
    """Warn of what was asked for and stays dense, with the reasons."""
    adapted = any(hasattr(m, "base_layer") and hasattr(m, "merge") for m in model.modules())
    remedy = "; merge the adapters first (PEFT: model.merge_and_unload())" if adapted else ""
    for kind, ratios in carried.items():
        without = [s for s in structures if kind not in s.groups]
        if any(ratios) and without:
            reasons = "; ".join(dict.fromkeys(r for s in without for r in s.reasons))
            warnings.warn(f"pp_fx leaves {kind} dense in some layers: {reasons}{remedy}", stacklevel=4)
    asked = [kind for kind, ratios in carried.items() if any(ratios)]
    if asked and not any(kind in s.groups for kind in asked for s in structures):
        other = [kind for kind in carried if kind not in asked and any(kind in s.groups for s in structures)]
        remedy = "".join(f"; {kind} can be pruned here, set {kind}_ratio" for kind in other)
        warnings.warn(f"pp_fx prunes nothing of this model{remedy}", stacklevel=4)
