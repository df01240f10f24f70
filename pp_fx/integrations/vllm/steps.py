"""What the present step prunes: read once from vLLM's forward context, and counted."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from ...config import ProbePruningConfig
from ...errors import UnsupportedModelError
from ...runtime.engine_step import ALL_DENSE, EngineStep, plan_step

logger = init_logger("vllm.pp_fx")
_KEY = "pp_fx_step"
_LOG_SECONDS = 10.0
"""As often as vLLM logs its own statistics."""


class Steps:
    """Plans every step once, for all layers; with decode="rolling" the selections lie on it.

    Attributes:
        share: of the model's MLP channels that pruned tokens run.
        steps, pruned: how many steps there were, and in how many tokens of prompts were pruned.
        tokens, pruned_tokens: likewise of tokens.
    """

    def __init__(self, settings: ProbePruningConfig) -> None:
        self.settings, self.share = settings, 1.0
        self.steps = self.pruned = self.tokens = self.pruned_tokens = 0
        self._logged = (time.monotonic(), 0, 0, 0, 0)

    def present(self, x: torch.Tensor) -> EngineStep:
        """The step that is running.

        Args:
            x: [T, H], of whichever layer.

        Returns:
            The step, its index tensors on x's device.

        Raises:
            UnsupportedModelError: no attention layer says where requests begin.
        """
        context = get_forward_context()
        found = context.additional_kwargs.get(_KEY)
        if found is None:
            found = context.additional_kwargs[_KEY] = self._plan(context.attn_metadata, x)
        return found

    def _plan(self, metadata: Any, x: torch.Tensor) -> EngineStep:
        if not metadata:  # vLLM measures memory or compiles
            return ALL_DENSE
        starts = next((m.query_start_loc for m in metadata.values() if hasattr(m, "query_start_loc")), None)
        if starts is None:
            raise UnsupportedModelError("no attention layer of this model says where requests begin (query_start_loc)")
        step = plan_step(starts.tolist(), x.shape[0], self.settings, self)
        self._count(step, x.shape[0])
        return step.to(x.device)

    def _count(self, step: EngineStep, tokens: int) -> None:
        self.steps += 1
        self.tokens += tokens
        if step.prunes:
            self.pruned += 1
            self.pruned_tokens += tokens if step.prompts is None else step.prompts.shape[0]
        now = time.monotonic()
        then, *before = self._logged
        if now - then < _LOG_SECONDS:
            return
        counts = (self.steps, self.pruned, self.tokens, self.pruned_tokens)
        steps, pruned, tokens, pruned_tokens = (a - b for a, b in zip(counts, before, strict=True))
        self._logged = (now, *counts)
        logger.info(
            "pp_fx: %d of %d steps pruned, %.1f a second, with %.1f%% of all tokens; these ran %.1f%% of the MLP "
            "channels",
            pruned, steps, pruned / (now - then), 100 * pruned_tokens / max(tokens, 1), 100 * self.share,
        )  # fmt: skip
