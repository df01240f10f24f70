"""Which Python attributes a layer's code reads while it is captured: its graph holds their values for good."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

Reads = dict[type, set[str]]
"""Class of modules or configurations -> names."""

_PLAIN = (int, float, complex, str, bytes, type(None), tuple, list, dict, set, frozenset)
# a module's own bookkeeping; modes, which the caller sees to; what is looked up anew at every call
_OTHERS = frozenset(nn.Module().__dict__) | {"output_attentions", "output_hidden_states", "layer_idx"}


@contextlib.contextmanager
def recorded(reads: Reads) -> Iterator[None]:
    """Inside, every attribute that is read of any module or configuration is noted in `reads`."""

    def watched(read: Any) -> Any:
        def look(self: Any, name: str) -> Any:
            reads.setdefault(type(self), set()).add(name)
            return read(self, name)

        return look

    own = PreTrainedConfig.__dict__["__getattribute__"]  # it knows attributes by second names
    nn.Module.__getattribute__ = watched(object.__getattribute__)  # type: ignore[method-assign]
    PreTrainedConfig.__getattribute__ = watched(own)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        PreTrainedConfig.__getattribute__ = own  # type: ignore[method-assign]


def values(owner: Any, names: set[str]) -> list[tuple[str, Any]]:
    """The present values of those attributes of a module or configuration that are no parameters and no modules."""
    if isinstance(owner, nn.modules.dropout._DropoutNd):
        return []  # graphs are those of eval mode; `intact.check_dropout` sees to training
    there = vars(owner)
    found = sorted(n for n in names if n in there and n not in _OTHERS and not n.startswith("__"))
    if not isinstance(owner, nn.Module):
        found = [n for n in found if not n.startswith("_")]  # the attention implementation is looked up at every call
    kept = [(n, there[n]) for n in found if not isinstance(there[n], nn.Module | PreTrainedConfig)]
    return [(n, copy.deepcopy(v) if isinstance(v, _PLAIN) and not _holds(v) else v) for n, v in kept]


def _holds(value: Any) -> bool:
    """Whether something plain holds what is not."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return any(isinstance(v, Tensor | nn.Module) or not isinstance(v, _PLAIN) or _holds(v) for _, v in items)


def same(value: Any, before: Any) -> bool:
    """Whether an attribute still has its value."""
    return value is before or (type(value) is type(before) and isinstance(value, _PLAIN) and bool(value == before))
