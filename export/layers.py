"""Layers of one kind are traced once: the model is cut down to one representative of each kind.

Every tensor of a representative is an input of the trace, so nothing of it can be folded into a constant that would be
wrong in the layers it stands for. `repeat` puts the layers back.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.layers import find_layers
from ..rewrite.layer import ProbePrunedLayer
from ..runtime.names import LAYER
from .boundary import boundary
from .names import state_tensor
from .ports import Port


@dataclass(frozen=True)
class Layers:
    """The decoder layers of a model and who stands for whom.

    Attributes:
        path: of the module list in the model.
        all: the layers.
        kinds: for every layer the position of its representative.
        first: index of each representative.
    """

    path: str
    all: list[Any]
    kinds: list[int]
    first: list[int]

    @classmethod
    def of(cls, model: nn.Module) -> Layers:
        """The layers of a transformed model; two of one class with equal kept counts and modes are of one kind."""
        path, layers = find_layers(model)
        keys: list[Any] = []
        for layer in layers:
            states = layer.states().values() if isinstance(layer, ProbePrunedLayer) else ()
            shapes = tuple((n, t.shape, t.dtype) for n, t in tensors_of(layer).items())
            keys.append(
                (type(layer), shapes, tuple((s.kind, s.kept_units, s.step_units, s.mode, s.calibrated) for s in states))
            )
        distinct = list(dict.fromkeys(keys))
        return cls(path, list(layers), [distinct.index(k) for k in keys], [keys.index(k) for k in distinct])

    def representatives(self, ports: list[Port]) -> list[Port]:
        """The ports of the representatives, whose index is their position in the model that is cut down."""
        places = {index: position for position, index in enumerate(self.first)}
        return [dataclasses.replace(port, index=places[port.index]) for port in ports if port.index in places]

    @contextlib.contextmanager
    def cut_down(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the representatives alone, and marks where each begins and ends."""
        parent_path, _, name = self.path.rpartition(".")
        parent, kept = model.get_submodule(parent_path), [self.all[i] for i in self.first]
        infos = [layer.__dict__[LAYER] for layer in kept]
        whole, hooks = getattr(parent, name), []
        try:
            setattr(parent, name, nn.ModuleList(kept))
            for position, (layer, info) in enumerate(zip(kept, infos, strict=True)):
                info.index = position
                hooks.append(layer.register_forward_pre_hook(_Enter(position), with_kwargs=True))
                hooks.append(layer.register_forward_hook(_Leave(position)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for index, info in zip(self.first, infos, strict=True):
                info.index = index
            setattr(parent, name, whole)


class _Enter:
    def __init__(self, position: int) -> None:
        self.position = position

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (boundary(args[0], self.position, True), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": boundary(kwargs["hidden_states"], self.position, True)}


class _Leave:
    def __init__(self, position: int) -> None:
        self.position = position

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return boundary(output, self.position, False)
        return (boundary(output[0], self.position, False), *output[1:])


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a layer by name, without the history that prefill updates."""
    found = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    if isinstance(layer, ProbePrunedLayer):
        for kind, state in layer.states().items():
            if state.mode == "run":
                for key in state.history(learned=True):
                    found.pop(state_tensor(kind, key), None)
    return found


@contextlib.contextmanager
def with_tensors(layer: nn.Module, given: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the layer works on the given tensors in place of its own."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for name, tensor in given.items():
            path, _, leaf = name.rpartition(".")
            module = layer.get_submodule(path)
            home: Any = module._parameters if leaf in module._parameters else module._buffers
            before.append((home, leaf, home[leaf]))
            home[leaf] = tensor
        yield
    finally:
        for home, leaf, old in reversed(before):
            home[leaf] = old


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without gradients."""
    return {name: torch.Tensor.detach(tensor) for name, tensor in tensors.items()}
