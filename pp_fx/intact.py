"""Modules inside a rewritten layer: its graph reads their parameters and calls none of them.

So hooks on them, and adapters put in their place, would be lost without a word; both are refused.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .errors import StateError, UnsupportedModelError

_keys = itertools.count(1)
_known: weakref.WeakValueDictionary[int, Inside] = weakref.WeakValueDictionary()


class Inside:
    """The modules inside a model's layers as `transform` found them. A deepcopy has a key of its own.

    Attributes:
        key: an int that no other object of this process has.
        parts: parent's dict of modules, name there, module.
    """

    def __init__(self, parts: Iterable[tuple[dict[str, Any], str, nn.Module]]) -> None:
        self.key = next(_keys)
        self.parts = tuple(parts)
        _known[self.key] = self

    @classmethod
    def of(cls, layers: Iterable[nn.Module]) -> Inside:
        """Of layers that are rewritten already: without the states that `transform` has put into them."""
        return cls(
            (parent._modules, name, module)
            for layer in layers
            for parent in layer.modules()
            for name, module in parent._modules.items()
            if module is not None and not (parent is layer and name.startswith("pp_"))
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Inside:
        return Inside(copy.deepcopy(self.parts, memo))


def refuse_hooks(index: int, layer: nn.Module) -> None:
    """Before `transform`.

    Raises:
        UnsupportedModelError: a module inside the layer has hooks, or its forward is replaced.
    """
    for name, module in layer.named_modules():
        where = f"layer {index}{'.' + name if name else ''} ({type(module).__name__})"
        if "forward" in module.__dict__:
            raise UnsupportedModelError(f"{where} has its forward replaced (accelerate offload?); remove it first")
        if name and _hooked(module):
            raise UnsupportedModelError(f"{where} has forward hooks that the graph would bypass; remove them first")


def check_inside(inside: Inside) -> None:
    """At every call.

    Raises:
        StateError: since `transform`, a module inside a layer was replaced (an adapter) or has got a hook.
    """
    changed = _changed(inside.key)
    if changed is not None:
        raise StateError(
            f"{changed} since pp_fx.transform, and the rewritten layer would not call it; call pp_fx.restore(model) "
            "first (and transform again afterwards: what adapters touch stays dense)"
        )


@torch.compiler.assume_constant_result
def _changed(key: int) -> str | None:
    """What has changed, in words; looked at once for every trace of a compiler, which needs no guards for it."""
    for modules, name, module in _known[key].parts:
        if modules.get(name) is not module:
            return f"module {name} ({type(module).__name__}) of a decoder layer was replaced"
        if (module._forward_hooks or module._forward_pre_hooks) and _hooked(module):
            return f"module {name} ({type(module).__name__}) inside a decoder layer has got a forward hook"
    return None


def _hooked(module: nn.Module) -> bool:
    """Whether somebody listens to a module; transformers itself does, to collect attention weights (refused)."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
