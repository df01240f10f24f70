"""What stands in for the dropped channels: a vector added to the branch's output, by registry name.

Adding one: write a function and put it into `COMPENSATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Compensation = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | float], Tensor]


def mean(
    weight: Tensor, dropped: Tensor, history: Tensor | None, probe: Tensor | None, share: Tensor | float
) -> Tensor:
    """The dropped channels' mean output, W @ mu: mu is part history, part probe (FLAP's bias, made dynamic).

    Args:
        weight: output projection [H, C].
        dropped: fp32 [C], 1 for the dropped channels, 0 for the kept ones.
        history: fp32 [C], running mean of the intermediate state, or None without history.
        probe: fp32 [C], mean of the probe state over its real rows, or None without a probe. One of the two is given.
        share: of the history in mu, in [0, 1]; 0 while the history has seen nothing.

    Returns:
        [H] in the weight's dtype.
    """
    if probe is None or history is None:
        mu = history if probe is None else probe
    else:
        mu = share * history + (1 - share) * probe
    return weight @ (mu * dropped).to(weight.dtype)  # type: ignore[operator]


COMPENSATIONS: dict[str, Compensation] = {"mean": mean}
