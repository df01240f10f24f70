"""What a pruning method is: settings of one and the same graphs, and who plans the ratios of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

Planner = Literal["one_threshold"]
PUBLISHED: dict[str, Any] = {"skip_layers": 3, "decode": "sticky", "guard": False}
"""What the published methods have in common, as Probe Pruning's authors run them: three dense layers, one selection,
calls of every size pruned."""


@dataclass(frozen=True)
class Method:
    """A pruning method by registry name.

    Attributes:
        name: in `METHODS` and on the command line.
        summary: one line.
        paper: link to where it comes from.
        settings: fields of ProbePruningConfig that make it, as JSON types.
        planner: who spreads the ratios over the layers before the model is transformed: a name in
            `pp_fx.measure.planners`, or (untransformed model, configuration, calibration batches) -> configuration with
            a ratio for every layer; None where the layers share one ratio.
    """

    name: str
    summary: str
    paper: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    planner: Planner | Callable[[nn.Module, Any, Any], Any] | None = None

    configure: ClassVar[Callable[[dict[str, Any]], Any]]
    """ProbePruningConfig.from_dict; `pp_fx.config`, which stands on this module, puts it here."""

    def config(self, mlp_ratio: float | None = None, attention_ratio: float = 0.0, **changes: Any) -> Any:
        """The method's configuration.

        Args:
            mlp_ratio, attention_ratio: as in ProbePruningConfig; None: its default.
            **changes: any other field.

        Returns:
            ProbePruningConfig.

        Raises:
            ConfigError: a field is unknown or invalid.
        """
        ratios = {"attention_ratio": attention_ratio, **({} if mlp_ratio is None else {"mlp_ratio": mlp_ratio})}
        return Method.configure({**self.settings, **ratios, **changes})
