"""Which rows of the residual run ahead as the probe: a part of the configuration."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .checks import check_choice, check_integers, check_number
from .errors import ConfigError

FirstPosition = Literal["always", "few", "never"]
Ranking = Literal["residual", "outlier", "even"]
ProbeAttention = Literal["queries", "rows"]

_number = functools.partial(check_number, error=ConfigError)
_choice = functools.partial(check_choice, error=ConfigError)


@dataclass(frozen=True)
class ProbeConfig:
    """Which rows of the residual run ahead as the probe.

    The probe is a static rectangle of B' samples x T' positions (paper, section 3.1).
    T' = ceil(token_fraction * T), B' = ceil(sample_fraction * B); the default takes 2.5% of the positions of *all*
    samples, the paper 50% of the positions of 5% of the samples. Positions count from each sample's first real token,
    on whichever side it is padded; T, of which the share is taken, is the width of the batch, padding included, as
    every count of tokens in `ProbePruningConfig`: a shape is known without waiting for the device.

    Args:
        token_fraction: share of the positions, in (0, 1].
        sample_fraction: share of the samples, in (0, 1].
        min_positions: at least so many positions (or all, when there are fewer).
        attention: "queries": the probe rows of an attention branch are its queries and attend to the whole keys and
            values, which no pruning touches; "rows": they attend to each other alone (paper).
        first_position: put position 0, each sample's first real token, into the probe in place of the lowest ranked
            pick (of even ones, the first): "always", "few" (the authors' rule: only if at most 10 are picked), "never".
        ranking: of positions and samples: "residual", by the norm of the residual (paper); "outlier", the same with
            every feature weighted by what the branch's input projections make of it (after OCP, Ji and Sun, ACL 2026);
            "even", evenly spaced over the longest sample.
    """

    token_fraction: float = 0.025
    sample_fraction: float = 1.0
    min_positions: int = 2
    first_position: FirstPosition = "never"
    attention: ProbeAttention = "queries"
    ranking: Ranking = "even"

    def __post_init__(self) -> None:
        for name in ("token_fraction", "sample_fraction"):
            _number(f"probe.{name}", getattr(self, name), 1e-6, 1)
        check_integers(1, ConfigError, **{"probe.min_positions": self.min_positions})
        _choice("probe.ranking", self.ranking, get_args(Ranking))
        _choice("probe.first_position", self.first_position, get_args(FirstPosition))
        _choice("probe.attention", self.attention, get_args(ProbeAttention))

    def positions(self, length: int) -> int:
        """T', the number of probe positions for sequences of `length` tokens (same rule as the graphs use)."""
        share: int = ceil_share(length, self.token_fraction)
        return min(length, max(self.min_positions, share))

    def samples(self, batch: int) -> int:
        """B', the number of probe samples of a batch of `batch` sequences."""
        share: int = ceil_share(batch, self.sample_fraction)
        return min(batch, max(1, share))


def ceil_share(total: Any, fraction: float) -> Any:
    """ceil(fraction * total) in integer arithmetic, so that a symbolic `total` stays symbolic (torch.compile)."""
    return (total * round(fraction * 1_000_000) + 999_999) // 1_000_000
