"""What a pruning method is: settings of one and the same graphs, and what it plans before the model is transformed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config import ProbePruningConfig


@dataclass(frozen=True)
class Method:
    """A pruning method by registry name.

    Attributes:
        name: in `METHODS` and on the command line.
        summary: one line.
        paper: link to where it comes from.
        settings: fields of ProbePruningConfig that make it.
        plan: (untransformed model, config, calibration batches) -> config with a ratio for every layer, for methods
            that spread the ratios over the layers themselves; None for the others.
    """

    name: str
    summary: str
    paper: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    plan: Callable[[nn.Module, ProbePruningConfig, Any], ProbePruningConfig] | None = None

    def config(self, mlp_ratio: float = 0.4, attention_ratio: float = 0.0, **changes: Any) -> ProbePruningConfig:
        """The method's configuration.

        Args:
            mlp_ratio, attention_ratio: as in ProbePruningConfig.
            **changes: any other field.

        Raises:
            ConfigError: a field is invalid.
        """
        ratios = {"mlp_ratio": mlp_ratio, "attention_ratio": attention_ratio}
        return ProbePruningConfig(**{**self.settings, **ratios, **changes})
