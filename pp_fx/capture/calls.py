"""How a model really calls its layers: recorded without running their bodies."""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import CaptureError
from .layers import signature_of

Call = tuple[tuple, dict[str, Any]]
"""Arguments and keyword arguments of a layer."""


def record_calls(model: nn.Module, layers: nn.ModuleList, batch: int, length: int) -> list[Call]:
    """The arguments that the model passes to every layer for `batch` x `length` tokens, one of them padded.

    The layers' bodies are skipped, so this costs an embedding, a mask and a rotary table whatever the model's size.

    Raises:
        CaptureError: the model does not call each of its layers once with hidden states [batch, length, H].
    """
    cause: Exception | None = None
    for result in (lambda hidden: hidden, lambda hidden: (hidden,)):  # layers return a tensor, or a tuple with it
        try:
            calls = _record(model, layers, batch, length, result)
        except Exception as error:  # whatever the model raises at bodies that are skipped
            cause = error
            continue
        if all(_hidden(call).shape[:2] == (batch, length) and _hidden(call).ndim == 3 for call in calls.values()):
            if len(calls) == len(layers):
                return [calls[i] for i in range(len(layers))]
    raise CaptureError(
        f"{type(model).__name__} does not call each of its {len(layers)} layers with hidden states [B, T, H]; "
        f"it cannot be captured{f' ({cause})' if cause else ''}"
    ) from cause


def _hidden(call: Call) -> torch.Tensor:
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def masks_are_inverted(layer: nn.Module, call: Call) -> bool:
    """Whether a boolean mask of a recorded call says True where a token may not attend (MPT)."""
    mask = signature_of(layer).bind(*call[0], **call[1]).arguments.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or isinstance(mask, FakeTensor):
        return False
    return not bool(mask[-1].flatten()[-1])  # the last token of an unpadded row sees itself


def _record(model: Any, layers: nn.ModuleList, batch: int, length: int, result: Any) -> dict[int, Call]:
    calls: dict[int, Call] = {}

    def recorder(index: int):
        def forward(*args, **kwargs):
            calls[index] = (args, kwargs)
            return result(_hidden(calls[index]))

        return forward

    weight = model.get_input_embeddings().weight
    device, mode = weight.device, getattr(weight, "fake_mode", contextlib.nullcontext())
    ids = torch.zeros((batch, length), dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # a padded row makes the model build a real mask tensor
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
    known = inspect.signature(model.forward).parameters
    if "position_ids" in known:
        inputs["position_ids"] = torch.arange(length, device=device).expand(batch, length)
    inputs |= {name: False for name in ("output_router_logits",) if name in known}  # no router runs
    try:
        for i, layer in enumerate(layers):
            layer.__dict__["forward"] = recorder(i)
        with torch.no_grad(), mode, _hooks_silenced(model):
            model(**inputs)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
    return calls


@contextlib.contextmanager
def _hooks_silenced(model: nn.Module) -> Iterator[None]:
    """The user's forward hooks must not see the recording calls."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    before = [(m, name, m.__dict__[name]) for m in model.modules() for name in names if m.__dict__[name]]
    try:
        for module, name, _ in before:
            module.__dict__[name] = OrderedDict()
        yield
    finally:
        for module, name, hooks in before:
            module.__dict__[name] = hooks
