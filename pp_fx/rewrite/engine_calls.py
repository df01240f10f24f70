"""Calls of transformers' continuous batching (`generate_batch`): known by their arguments, refused or planned, once.

A call is one flat row of tokens [1, T] with `cu_seq_lens_q`, where each request's tokens begin in it
(transformers/generation/continuous_batching/input_outputs.py, `PagedAttentionArgs`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor

from ..config import ProbePruningConfig
from ..errors import ConfigError, StateError
from ..runtime.engine_step import ALL_DENSE, EngineStep, by_history, check_settings, plan_step
from ..runtime.names import LAYER
from ..runtime.plan import LayerInfo
from ..runtime.split import join_rows
from ..runtime.state import GroupState

ENGINE = "continuous batching"


def is_engine_call(kwargs: dict[str, Any]) -> bool:
    """Whether a call's keyword arguments are those of a step of continuous batching: it reads or writes pages."""
    paged = "paged" in type(kwargs.get("cache")).__name__.lower()
    return paged or "write_index" in kwargs or kwargs.get("block_table") is not None


def engine_step(layer: LayerInfo, unsplit: str | None, shape: tuple[int, int], kwargs: dict[str, Any]) -> EngineStep:
    """The step that a call is.

    Args:
        layer: what the first layer knows.
        unsplit: what `unsplit` has found.
        shape: of the call's tokens, [1, T].
        kwargs: of the call.

    Returns:
        The step, its index tensors on the device of `cu_seq_lens_q`.

    Raises:
        ConfigError: `engine_step.check_settings`.
        StateError: the call does not say where requests begin or gives no pages that a selection could lie on, is
            compiled or recorded, or an MLP cannot be split.
    """
    settings, pages = layer.settings, kwargs.get("cache")
    check_settings(settings, ENGINE)
    if unsplit is not None:
        raise StateError(unsplit)
    starts = kwargs.get("cu_seq_lens_q")
    if not isinstance(starts, Tensor) or shape[0] != 1:
        raise StateError(
            f"transformers {transformers.__version__} calls the model with pages of a KV cache and not with "
            f"cu_seq_lens_q and one flat row of tokens (the batch is {shape[0]}), so nothing says which tokens belong "
            "together; use another version (pp_fx was tested with 5.23), model.generate, or pp_fx.restore(model)"
        )
    rolls = settings.decode == "rolling"
    if rolls and pages is None:
        raise StateError(
            "decode='rolling' keeps its selection with the pages, and this call has no `cache`; set decode='step' or "
            "'dense'"
        )
    if kwargs.get("block_table") is not None and not rolls:
        # every request decodes, and nothing has to be looked up: a graph may record it
        return EngineStep(decode="step") if settings.decode == "step" else ALL_DENSE
    recorded = starts.is_cuda and torch.cuda.is_current_stream_capturing()
    if recorded or torch.compiler.is_compiling():
        raise StateError(
            f"a step of continuous batching that is {'recorded as a CUDA graph' if recorded else 'compiled'} would "
            f"repeat the decisions of another step; {_uncompiled(settings)}"
        )
    return plan_step(starts.tolist(), shape[1], settings, pages, layer.owner).to(starts.device)


def unsplit(layers: Iterable[Any]) -> str | None:
    """Which MLP cannot run a part of a step's tokens in another way, in words; None where all can.

    Args:
        layers: rewritten layers.
    """
    for layer in layers:
        state = layer.states().get("mlp")
        if state is None or any(node.target is join_rows for node in layer.graph.nodes):
            continue
        info = layer.__dict__[LAYER]
        if state.prunes or (state.steps and info.settings.decode == "step"):
            return (
                f"the MLP of layer {info.index} ({layer.original_class.__name__}) reads more than its own tokens, so "
                "prompt tokens cannot run otherwise than tokens that decode beside them; set its mlp_ratio and "
                "decode_ratio to 0, use model.generate, or pp_fx.restore(model)"
            )
    return None


def check_ready(settings: ProbePruningConfig, states: Iterable[GroupState]) -> None:
    """Before the first step.

    Raises:
        ConfigError: `engine_step.check_settings`.
        StateError: the history alone is to select, and there is none.
    """
    check_settings(settings, ENGINE)
    if by_history(settings) and not all(state.calibrated for state in states if state.prunes):
        raise StateError(
            f"freeze_history={settings.freeze_history} with probe={settings.probe} selects by the history alone in "
            "continuous batching, and the model has none; call pp_fx.calibrate first, or set freeze_history=False"
        )


def check_compilation(config: Any, settings: ProbePruningConfig) -> None:
    """What transformers has made of its `ContinuousBatchingConfig`.

    Raises:
        ConfigError: steps whose decisions differ are to be compiled or recorded as CUDA graphs: those with prompts, and
            with decode="rolling" all.
    """
    graphs = getattr(config, "cuda_graph_booleans", (False, False))
    names = ("varlen_compile_config", "decode_compile_config")[: 1 + (settings.decode == "rolling")]
    compiled = {name: getattr(config, name, None) for name in names}
    if any(graphs[: len(names)]) or any(found is not None for found in compiled.values()):
        modes = " and ".join(f"{name}={found and repr(found.mode)}" for name, found in compiled.items())
        raise ConfigError(
            f"use_cuda_graph={graphs} and {modes} (transformers sets what is left open by device and attention) would "
            f"repeat one step's decisions in all others; {_uncompiled(settings)}"
        )


def _uncompiled(settings: ProbePruningConfig) -> str:
    """How to run the steps that decide something as they are."""
    if settings.decode == "rolling":
        graphs, configs = "False", "varlen_compile_config=None, decode_compile_config=None"
    else:
        graphs, configs = "(False, True)", "varlen_compile_config=None"
    return f"set ContinuousBatchingConfig(use_cuda_graph={graphs}, default_compile_level=0, {configs})"
