"""The history as a file: `pp_fx_history.safetensors`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import StateError
from ..process_settings import own_defaults
from ..ranks import agreed, of_all
from ..rewrite.layer import layers_of
from ..runtime.state import GroupState
from .history_shards import shard_of, whole_of

HISTORY_FILE = "pp_fx_history.safetensors"


def write_history(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Write the history of every pruned group; the file appears when all of it is written.

    Of a tensor parallel model every rank calls it, and the first one writes the history of all shards.
    """
    tensors: dict[str, torch.Tensor] = {}
    calibrated: list[str] = []
    shards = None
    for name, state in _pruned(model).items():
        shards = shards or state.shards
        own = {key: tensor.detach().cpu().contiguous() for key, tensor in state.history().items()}
        whole = own if state.shards is None else whole_of(of_all(own, state.shards.group))
        tensors |= {f"{name}.{key}": tensor for key, tensor in whole.items()}
        calibrated += [name] * state.calibrated
    path = Path(directory, HISTORY_FILE)
    with agreed(None if shards is None else shards.group):
        if shards is None or shards.rank == 0:
            _write(path, tensors, calibrated, 1 if shards is None else shards.size)
    return path


def _write(path: Path, tensors: dict[str, torch.Tensor], calibrated: list[str], shards: int) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        notes = {"format": "pt", "calibrated": " ".join(calibrated), "sha256": _checksum(tensors)}
        notes |= {"shards": str(shards)} if shards > 1 else {}
        notes["tensor_names"] = "[]"  # torchao's reader, which vLLM has go over all files, finds no weights in this one
        save_file(tensors, partial, metadata=notes)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_history(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a history file into a transformed model. All of it is checked before anything changes.

    Args:
        model: transformed with the configuration that the file was written with.
        path: what `save_pretrained` has written.

    Raises:
        StateError: the file cannot be read, or does not fit the model.
    """
    load_states(_pruned(model), path)


@own_defaults()
def load_states(states: dict[str, GroupState], path: str | os.PathLike, shard: tuple[int, int] | None = None) -> None:
    """`read_history` into states, of a transformed model or of an engine, whatever the shards that wrote it.

    Args:
        states: `3.mlp` -> state, of every group that prunes.
        path: what `save_pretrained` has written.
        shard: rank and number of the equal shards that the units are split into; the states hold one of them. None:
            what each state's own `shards` says.

    Raises:
        StateError: the file cannot be read, or does not fit the states.
    """
    expected = {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.history().items()}
    remedy = (
        "save the model again, or delete the file and set 'history_file': false in config.json to start without one"
    )
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if names != set(expected):
                odd = ", ".join(sorted(names ^ set(expected))[:3])
                raise StateError(f"{path} does not fit the model's configuration ({odd}, ..); {remedy}")
            whole = {name: file.get_tensor(name) for name in names}
            written = int(metadata.get("shards", "1"))
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(f"{path} cannot be read ({error}); {remedy}") from None
    tensors: dict[str, torch.Tensor] = {}
    for name, state in states.items():
        history = {key: whole[f"{name}.{key}"] for key in state.history()}
        rank, count = shard or (state.shards or (0, 1))[:2]
        wanted = 0 if state.directions is None else len(state.directions)
        found = shard_of(history, written, rank, count, wanted)
        tensors |= {f"{name}.{key}": tensor for key, tensor in found.items()}
    for name, tensor in tensors.items():
        here = expected[name]
        if tensor.shape != here.shape or tensor.dtype != here.dtype:
            raise StateError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, the model's is {here.dtype} "
                f"{tuple(here.shape)}; {remedy}"
            )
        if not torch.isfinite(whole[name]).all():
            raise StateError(f"{path}: {name} holds numbers that are not finite; {remedy}")
    if metadata.get("sha256") != _checksum(whole):
        raise StateError(f"{path} is not what was written (checksum differs or is missing); {remedy}")
    calibrated = set(metadata.get("calibrated", "").split())
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)
    for name, state in states.items():
        state.calibrated = name in calibrated


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def holds_history(model: nn.Module) -> bool:
    """Whether a transformed model keeps any statistics."""
    return any(state.history() for state in _pruned(model).values())


def _pruned(model: nn.Module) -> dict[str, GroupState]:
    """`3.mlp` -> state, of the groups that prune."""
    layers = enumerate(layers_of(model))
    return {f"{i}.{kind}": s for i, layer in layers for kind, s in layer.states().items() if s.prunes}
