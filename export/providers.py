"""onnxruntime's execution providers."""

from __future__ import annotations

import onnxruntime

from ..errors import InputError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def check_provider(provider: str) -> None:
    """Refuse a provider that this onnxruntime was not built with.

    Raises:
        InputError: it was not.
    """
    there = onnxruntime.get_available_providers()
    if provider not in there:
        gpu = "; pip install 'pp-fx[onnxruntime-gpu]' in place of onnxruntime brings CUDA's" if provider == CUDA else ""
        raise InputError(f"provider={provider!r} is not in this onnxruntime; choose one of {', '.join(there)}{gpu}")
