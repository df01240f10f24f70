"""What a transformed model writes beside its ordinary weights: the configuration and the history; and reading it back.

`transform` gives the model object a `save_pretrained` of its own, which calls transformers' and adds
`pp_fx_history.safetensors`; `pp_fx.hf_quantizer` reads both in `from_pretrained`. Weights keep their names and shapes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .defaults import own_defaults
from .errors import InputError, StateError
from .transform import config_of, layers_of

HISTORY = "pp_fx_history.safetensors"
SETTINGS = "pp_fx_config.json"
"""Holds the pruning's configuration where config.json is to be that of the dense model."""
WEIGHTS = "weights"
"""Field of that file: `weights_fingerprint`."""
_END = 2**20
KEYS = ("energy", "mean", "directions", "gram", "seen")
"""Buffers of a GroupState that are its history."""


@own_defaults()
def save_pretrained(
    model: Any, save_directory: str | os.PathLike, *, quantization_config: bool = True, **kwargs: Any
) -> None:
    """transformers' `save_pretrained`, and the history; config.json tells `from_pretrained` to prune.

    Args:
        model: a transformed model.
        save_directory: folder, made if need be.
        quantization_config: True writes the pruning's configuration into config.json, as transformers' method for what
            changes a model as it is loaded; many other tools refuse such a folder. False leaves config.json as the
            dense model's, which every tool loads, and writes `pp_fx_config.json` beside it; then
            `from_pretrained(folder, quantization_config=pp_fx.ProbePruningHfConfig.from_pretrained(folder))` prunes.
        **kwargs: of transformers' method.

    Raises:
        InputError: `push_to_hub=True`; `model.push_to_hub(repo_id)` sends the whole folder.
        StateError: the model is quantized as well.
    """
    from .hf_quantizer import ProbePruningHfConfig

    if kwargs.pop("push_to_hub", False):
        raise InputError("push_to_hub=True would leave the history behind; call model.push_to_hub(repo_id)")
    config = config_of(model)
    if hasattr(model.config, "quantization_config"):
        raise StateError(
            f"model.config.quantization_config is set ({type(model.config.quantization_config).__name__}); quantized "
            "weights cannot be saved with a pruning configuration; call pp_fx.restore(model) first"
        )
    settings = ProbePruningHfConfig(config, history_file=holds_history(model))
    if quantization_config:
        model.config.quantization_config = settings
    try:
        type(model).save_pretrained(model, save_directory, **kwargs)
    finally:
        if quantization_config:
            del model.config.quantization_config
    if not kwargs.get("is_main_process", True):
        return
    if holds_history(model):
        write_history(model, save_directory)
    apart = Path(save_directory, SETTINGS)
    apart.unlink(missing_ok=True)  # of an earlier save
    if not quantization_config:
        noted = {**settings.to_dict(), WEIGHTS: weights_fingerprint(save_directory)}
        apart.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")


def weights_fingerprint(directory: str | os.PathLike) -> str | None:
    """Of the names, sizes and ends of a folder's weight files, a few MB to read; None where there are none.

    A dense model that is saved over a pruned one later leaves `pp_fx_config.json` behind: it must not prune that one.
    """
    files = sorted(p for p in Path(directory).glob("*.safetensors") if p.name != HISTORY)
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size}".encode())
            for start in (0, max(0, size - _END)):
                file.seek(start)
                digest.update(file.read(_END))
    return digest.hexdigest() if files else None


def write_history(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Write the history of every pruned group; the file appears when all of it is written."""
    tensors: dict[str, torch.Tensor] = {}
    calibrated: list[str] = []
    for name, state in _states(model).items():
        found = {f"{name}.{key}": getattr(state, key) for key in KEYS if getattr(state, key) is not None}
        tensors |= {key: value.detach().cpu().contiguous() for key, value in found.items()}
        calibrated += [name] * state.calibrated
    path = Path(directory, HISTORY)
    partial = path.with_name(f".{path.name}.partial")
    try:
        notes = {"format": "pt", "calibrated": " ".join(calibrated), "sha256": _checksum(tensors)}
        save_file(tensors, partial, metadata=notes)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@own_defaults()
def read_history(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a history file into a transformed model. All of it is checked before anything changes.

    Args:
        model: transformed with the configuration that the file was written with.
        path: what `save_pretrained` has written.

    Raises:
        StateError: the file cannot be read, or does not fit the model.
    """
    states = _states(model)
    expected = {f"{n}.{k}": getattr(s, k) for n, s in states.items() for k in KEYS if getattr(s, k) is not None}
    remedy = (
        "save the model again, or delete the file and set 'history_file': false in config.json to start without one"
    )
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if names != set(expected):
                odd = ", ".join(sorted(names ^ set(expected))[:3])
                raise StateError(f"{path} does not fit the model's configuration ({odd}, ..); {remedy}")
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(f"{path} cannot be read ({error}); {remedy}") from None
    for name, tensor in tensors.items():
        here = expected[name]
        if tensor.shape != here.shape or tensor.dtype != here.dtype:
            raise StateError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, the model's is {here.dtype} "
                f"{tuple(here.shape)}; {remedy}"
            )
        if not torch.isfinite(tensor).all():
            raise StateError(f"{path}: {name} holds numbers that are not finite; {remedy}")
    if metadata.get("sha256") != _checksum(tensors):
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
    return any(getattr(state, key) is not None for state in _states(model).values() for key in KEYS)


def _states(model: nn.Module) -> dict[str, Any]:
    """`3.mlp` -> state, of the groups that prune."""
    layers = enumerate(layers_of(model))
    return {f"{i}.{kind}": s for i, layer in layers for kind, s in layer.states().items() if s.prunes}
