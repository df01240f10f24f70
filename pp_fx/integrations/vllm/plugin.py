"""The entry point `vllm.general_plugins`: vLLM calls it in each of its processes, possibly twice."""

from __future__ import annotations

from vllm.model_executor.layers.quantization import register_quantization_config

from ..hf_config import METHOD
from .method import PpFxConfig


def register() -> None:
    """Make vLLM know `quantization="pp_fx"` and folders whose config.json says so.

    https://docs.vllm.ai/en/latest/design/plugin_system.html. The method is no quantization; the registry is the one
    place at which vLLM hands over every linear layer of a model.
    """
    register_quantization_config(METHOD)(PpFxConfig)
