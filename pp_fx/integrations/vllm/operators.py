"""The two calls of a pruned MLP as operators `pp_fx::engine_mlp` and `pp_fx::engine_mlp_result`.

What a step prunes is decided in Python, from vLLM's forward context; a compiled graph knows these operators by their
shapes alone. vLLM's piecewise graphs are split at them (`OPERATORS`), so that CUDA graphs do not record a decision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

if TYPE_CHECKING:
    from .mlp import PrunedMlp

SAMPLE = 16
"""Channels that pass between the two layers (`mlp`)."""
OPERATORS = ("pp_fx::engine_mlp", "pp_fx::engine_mlp_result")
_library = torch.library.Library("pp_fx", "FRAGMENT")
_library.define("engine_mlp(Tensor x, Tensor? bias, str name) -> Tensor")
_library.define("engine_mlp_result(Tensor sample, Tensor? bias, str name, SymInt hidden) -> Tensor")


def _mlp(name: str) -> PrunedMlp:
    found: PrunedMlp = get_forward_context().no_compile_layers[name]
    return found


def _run(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return _mlp(name).run(x, bias)


def _result(sample: Tensor, bias: Tensor | None, name: str, hidden: int) -> Tensor:
    return _mlp(name).result(sample, bias)


_library.impl("engine_mlp", _run, "CompositeExplicitAutograd")
_library.impl("engine_mlp_result", _result, "CompositeExplicitAutograd")
_library.impl("engine_mlp", lambda x, bias, name: x.new_empty(*x.shape[:-1], 2 * SAMPLE), "Meta")
_library.impl(
    "engine_mlp_result", lambda sample, bias, name, hidden: sample.new_empty(*sample.shape[:-1], hidden), "Meta"
)
