"""Which Python attributes a layer's code reads while it is captured: its graph holds their values for good."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

Reads = dict[type, set[str]]
"""Class of modules or configurations -> names."""

_MISSING = object()
_PLAIN = (int, float, complex, str, bytes, type(None), tuple, list, dict, set, frozenset)
# a module's own bookkeeping; modes, which the caller sees to; what is looked up anew at every call
_OTHERS = frozenset(nn.Module().__dict__) | {
    "output_attentions", "output_hidden_states", "layer_idx", "gradient_checkpointing",
}  # fmt: skip


def watch(layer: nn.Module, reads: Reads) -> None:
    """Note in `reads` whatever is read of the modules of `layer`, a copy made for capture, and of their configurations.

    Each gets a subclass of its own class, so that nobody else's reads count.
    """
    for module in layer.modules():
        config = vars(module).get("config")
        if config is not None and not hasattr(type(config), "_pp_fx_watched"):
            module.__dict__["config"] = copy.copy(config)
            _watch(module.__dict__["config"], reads)
        _watch(module, reads)


def _watch(owner: Any, reads: Reads) -> None:
    cls = type(owner)

    def look(self: Any, name: str) -> Any:
        reads.setdefault(cls, set()).add(name)
        return cls.__getattribute__(self, name)  # type: ignore[call-arg]

    body = {"__getattribute__": look, "__module__": cls.__module__, "_pp_fx_watched": True}
    owner.__class__ = type(cls.__name__, (cls,), body)


def values(owner: Any, names: set[str]) -> list[tuple[str, Any]]:
    """The present values of those attributes of a module or configuration that are no parameters and no modules."""
    if isinstance(owner, nn.modules.dropout._DropoutNd):
        return []  # graphs are those of eval mode; `rewrite.bypassed.check_dropout` sees to training
    there, cls = vars(owner), type(owner)
    wanted = sorted(n for n in names if n not in _OTHERS and not n.startswith("__"))
    if not isinstance(owner, nn.Module):
        wanted = [n for n in wanted if not n.startswith("_")]  # the attention implementation is looked up at every call
    kept = [(n, there[n]) for n in wanted if n in there and not _is_part(there[n])]
    found = [(n, copy.deepcopy(v) if isinstance(v, _PLAIN) and not _holds(v) else v) for n, v in kept]
    of_class = [n for n in wanted if n not in there and isinstance(getattr(cls, n, None), int | float | str)]
    return found + [(n, getattr(cls, n)) for n in of_class]


def present(owner: Any, cls: type, name: str) -> Any:
    """The value of an attribute now, of the object's own or of its original class `cls`."""
    found = vars(owner).get(name, _MISSING)
    return getattr(cls, name, _MISSING) if found is _MISSING else found


def _is_part(value: Any) -> bool:
    """Modules and configurations are watched themselves."""
    return isinstance(value, nn.Module) or hasattr(value, "to_diff_dict")


def _holds(value: Any) -> bool:
    """Whether something plain holds what is not."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return any(isinstance(v, Tensor | nn.Module) or not isinstance(v, _PLAIN) or _holds(v) for _, v in items)


def same(value: Any, before: Any) -> bool:
    """Whether an attribute still has its value."""
    return value is before or (type(value) is type(before) and isinstance(value, _PLAIN) and bool(value == before))
