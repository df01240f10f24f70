"""How the heads of the probe meet in the output: the Gram matrix of their outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import widened
from ..process_settings import without_autocast
from .plan import Plan
from .probe import ProbeRows, sample_rows
from .state import GroupState

TINY = 1e-30
"""Least mean square of a row of the residual: a row of zeros weighs as much as others."""


def output_gram(
    z: Tensor, residual: Tensor, real: Tensor | None, weight: Tensor, units: int, exports: bool = False
) -> Tensor:
    """G[g, h] = mean over the rows of <y_g - E y_g, y_h - E y_h> / mean(residual^2), where y_h = W_h z_h.

    The squared error of dropping a set of heads, their means compensated, in units of the residual that the output is
    added to, is the sum of G over the set.

    Args:
        z: [n, C], input of the output projection.
        residual: [n, H], what its output is added to.
        real: bool [n], which rows count, or None for all.
        weight: output projection [H, C].
        units: heads.
        exports: an exported graph is being traced.

    Returns:
        fp32 [units, units].
    """
    with torch.autocast(weight.device.type, enabled=False):
        z, scale = z.float(), residual.float().square().mean(-1).clamp(min=TINY).reciprocal().nan_to_num(0.0)
        count: Tensor | int = z.shape[0]
        if real is None:
            mean = z.mean(0)
        else:  # where, not a product: padded rows may hold Inf or NaN
            count = real.sum().clamp(min=1)
            z, scale = torch.where(real[:, None], z, 0.0), torch.where(real, scale, 0.0)
            mean = z.sum(0) / count
        dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
        heads = ((z - mean) * scale.sqrt()[:, None]).to(dtype).unflatten(1, (units, -1)).transpose(0, 1)
        blocks = widened(weight).t().to(dtype).unflatten(0, (units, -1))
        # a file holds each weight once, transposed; elsewhere a product the other way round would copy the weight
        products = heads @ blocks if exports else blocks.transpose(1, 2) @ heads.transpose(1, 2)
        outputs: Tensor = products.flatten(1).float()
        return outputs @ outputs.t() / count


@without_autocast
def probe_gram(
    state: GroupState, z: Tensor | None, rows: ProbeRows | None, residual: Tensor | None, weight: Tensor, plan: Plan
) -> Tensor | None:
    """`output_gram` of the probe, z [B', T', C] and residual [B', T', H]; None where no score reads it."""
    if not state.reads_gram or z is None or rows is None or residual is None:
        return None
    limit = plan.settings.compensation_rows
    sampled, real = sample_rows(z, rows, limit, plan)
    return output_gram(sampled, sample_rows(residual, rows, limit, plan)[0], real, weight, state.units, plan.exports)
