"""Modules inside a rewritten layer: its graph reads their parameters and calls none of them.

So hooks on them, adapters put in their place, another forward and other values of what their code reads would be lost
without a word; all are refused.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..capture.reads import Reads, present, same, values
from ..errors import StateError, UnsupportedModelError
from ..runtime.model_calls import COLLECTOR
from ..runtime.names import PREFIX
from .tensor_parallel import replaces_forward

_keys = itertools.count(1)
_known: weakref.WeakValueDictionary[int, Inside] = weakref.WeakValueDictionary()


class Part(NamedTuple):
    """A module inside a layer: its parent's dict of modules, its name there, the module and its class.

    `forward`: what stands in the module's own place of it: tensor parallelism's, or None.
    """

    modules: dict[str, Any]
    name: str
    module: nn.Module
    cls: type
    forward: Any = None


class Inside:
    """The modules inside a model's layers as `transform` found them. A deepcopy has a key of its own.

    Attributes:
        key: an int that no other object of this process has.
        parts: all modules inside the layers.
        attributes: module (or its configuration), its class, name and value of what capture read there.
        forwards: class, and the function that its `forward` is.
    """

    def __init__(self, parts: Any, attributes: Any, forwards: Any) -> None:
        self.key = next(_keys)
        self.parts, self.attributes, self.forwards = tuple(parts), tuple(attributes), tuple(forwards)
        _known[self.key] = self

    @classmethod
    def of(cls, layers: Iterable[Any], reads: Reads) -> Inside:
        """Of layers that are rewritten already: without the states that `transform` has put into them."""
        layers = list(layers)
        parts = [
            Part(parent._modules, name, module, type(module), module.__dict__.get("forward"))
            for layer in layers
            for parent in layer.modules()
            for name, module in parent._modules.items()
            if module is not None and not (parent is layer and name.startswith(PREFIX))
        ]
        owners: dict[int, tuple[Any, type]] = {id(layer): (layer, layer.original_class) for layer in layers}
        owners.update((id(part.module), (part.module, part.cls)) for part in parts)
        configs = (vars(owner).get("config") for owner, _ in tuple(owners.values()))
        owners.update((id(config), (config, type(config))) for config in configs if config is not None)
        attributes = (
            (owner, kind, name, value)
            for owner, kind in owners.values()
            for name, value in values(owner, reads.get(kind, set()))
        )
        classes = {kind for _, kind in owners.values() if issubclass(kind, nn.Module)}
        return cls(parts, attributes, ((kind, kind.forward) for kind in classes))

    def __deepcopy__(self, memo: dict[int, Any]) -> Inside:
        return Inside(*copy.deepcopy((self.parts, self.attributes), memo), self.forwards)


def refuse_hooks(index: int, layer: nn.Module) -> None:
    """Before `transform`.

    Raises:
        UnsupportedModelError: a module inside the layer has hooks, or its forward is replaced.
    """
    for name, module in layer.named_modules():
        where = f"layer {index}{'.' + name if name else ''} ({type(module).__name__})"
        if "forward" in module.__dict__ and not replaces_forward(module):
            raise UnsupportedModelError(
                f"{where} has its forward replaced (accelerate: offload, or a device_map over several devices?); load "
                "the model on one device, or on several by tensor parallelism"
            )
        if name and _hooked(module):
            raise UnsupportedModelError(f"{where} has forward hooks that the graph would bypass; remove them first")


def check_inside(inside: Inside) -> None:
    """At every call; a compiled model is looked at whenever it is traced.

    Raises:
        StateError: since `transform`, a module inside a layer was replaced (an adapter), has got a hook or another
            forward, or an attribute that its code reads has another value.
    """
    changed = _changed(inside.key)
    if changed is not None:
        raise StateError(
            f"{changed} since pp_fx.transform, and the rewritten layer would not see it; call pp_fx.restore(model) "
            "first (and transform again afterwards: what adapters touch stays dense)"
        )


def check_dropout(inside: Inside) -> None:
    """At every call in training mode: the graphs are those of eval mode.

    Raises:
        StateError: a module inside a layer would drop something.
    """
    where = _dropout(inside.key)
    if where is not None:
        raise StateError(
            f"the model is in training mode and {where}, which a rewritten layer would not do; set it to 0, call "
            "model.eval(), or pp_fx.restore(model)"
        )


@torch.compiler.assume_constant_result
def _dropout(key: int) -> str | None:
    inside = _known[key]
    found = [(m, name, cls) for _, name, m, cls, _ in inside.parts]
    found += [(owner, "configuration", cls) for owner, cls, name, _ in inside.attributes if _is_random(name)]
    for owner, name, cls in found:
        for attribute, value in vars(owner).items():
            share = attribute == "p" and isinstance(owner, nn.modules.dropout._DropoutNd)
            if (share or _is_random(attribute)) and isinstance(value, int | float) and value > 0:
                return f"{name} ({cls.__name__}) of a decoder layer has {attribute}={value}"
    return None


@torch.compiler.assume_constant_result
def _changed(key: int) -> str | None:
    """What has changed, in words; looked at once for every trace of a compiler, which needs no guards for it."""
    inside = _known[key]
    for cls, forward in inside.forwards:
        if cls.forward is not forward:
            return f"the forward of class {cls.__name__} was replaced"
    for modules, name, module, cls, forward in inside.parts:
        if modules.get(name) is not module:
            return f"module {name} ({cls.__name__}) of a decoder layer was replaced"
        if (module._forward_hooks or module._forward_pre_hooks) and _hooked(module):
            return f"module {name} ({cls.__name__}) inside a decoder layer has got a forward hook"
        if module.__dict__.get("forward") is not forward:
            return (
                f"module {name} ({cls.__name__}) inside a decoder layer has got another forward (accelerate offload?)"
            )
        if module.__class__ is not cls:
            return f"module {name} ({cls.__name__}) inside a decoder layer has become a {type(module).__name__}"
    for owner, cls, name, before in inside.attributes:
        value = present(owner, cls, name)
        if value is not before and not same(value, before) and not _is_random(name):
            return f"{name} of a {cls.__name__} in a decoder layer went from {before!r} to {value!r}"
    return None


def _is_random(attribute: str) -> bool:
    """Dropout, or a router's noise: shares that count in training alone."""
    return "dropout" in attribute or "jitter" in attribute


def _hooked(module: nn.Module) -> bool:
    """Whether somebody listens to a module; transformers itself does, to collect outputs (`model_calls.attention`)."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != COLLECTOR for hook in hooks)
