"""torch's process-wide settings, kept out of what pp_fx makes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_GLOBAL_HOOKS = (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks)


@contextlib.contextmanager
def own_defaults() -> Iterator[None]:
    """Inside (or in a function that it decorates), torch's own settings hold, whatever the caller has set.

    Hooks on all modules of the process (`register_module_forward_hook`) rest, too: a graph would hold what they do.
    The settings are: new tensors in fp32 on the CPU unless asked otherwise (`torch.set_default_dtype`,
    `torch.set_default_device`, a device as a context), no inference tensors, no autocast.
    """
    before, resting = torch.get_default_dtype(), [dict(hooks) for hooks in _GLOBAL_HOOKS]
    torch.set_default_dtype(torch.float32)
    for hooks in _GLOBAL_HOOKS:
        hooks.clear()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.device("cpu"))
            for kind in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(before)
        for hooks, own in zip(_GLOBAL_HOOKS, resting, strict=True):
            hooks.update(own)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a rewritten graph whose sums must be fp32, under the caller's autocast, too."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not kinds:
            return function(*args, **kwargs)
        with torch.autocast(kinds[0], enabled=False):
            return function(*args, **kwargs) if len(kinds) == 1 else call(*args, **kwargs)

    return call
