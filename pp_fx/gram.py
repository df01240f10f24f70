"""How heads meet in the output: the Gram matrix of their outputs, from probe rows or from calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .defaults import without_autocast
from .probe import sample_rows

if TYPE_CHECKING:
    from .plan import Plan
    from .probe import ProbeRows
    from .state import GroupState

_CHUNK = 256
_TINY = 1e-30


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
        z, scale = z.float(), residual.float().square().mean(-1).clamp(min=_TINY).reciprocal().nan_to_num(0.0)
        count: Tensor | int = z.shape[0]
        if real is None:
            mean = z.mean(0)
        else:  # where, not a product: padded rows may hold Inf or NaN
            count = real.sum().clamp(min=1)
            z, scale = torch.where(real[:, None], z, 0.0), torch.where(real, scale, 0.0)
            mean = z.sum(0) / count
        dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
        heads = ((z - mean) * scale.sqrt()[:, None]).to(dtype).unflatten(1, (units, -1)).transpose(0, 1)
        blocks = weight.t().to(dtype).unflatten(0, (units, -1))
        # a file holds each weight once, transposed; elsewhere a product the other way round would copy the weight
        outputs = heads @ blocks if exports else blocks.transpose(1, 2) @ heads.transpose(1, 2)
        outputs = outputs.flatten(1).float()
        return outputs @ outputs.t() / count


@without_autocast
def probe_gram(
    state: GroupState, z: Tensor | None, rows: ProbeRows | None, residual: Tensor | None, weight: Tensor, plan: Plan
) -> Tensor | None:
    """`output_gram` of the probe, z [B', T', C] and residual [B', T', H]; None where no score reads it."""
    if not state.reads_gram or z is None or rows is None or residual is None:
        return None
    limit = state.config.compensation_rows
    sampled, real = sample_rows(z, rows, limit, plan)
    return output_gram(sampled, sample_rows(residual, rows, limit, plan)[0], real, weight, state.units, plan.exports)


def gram_sums(z: Tensor, residual: Tensor, real: Tensor | None, weight: Tensor, units: int) -> dict[str, Tensor]:
    """What `gram_of_sums` needs of a batch, z [B, T, C] and residual [B, T, H]: sums over sequences and their rows.

    As `output_gram`, but the means are those of each sequence: a batch's own means are compensated, too.
    """
    z, scale = z.float(), residual.float().square().mean(-1).clamp(min=_TINY).reciprocal()
    if real is None:
        count = torch.tensor(float(scale.numel()), dtype=torch.float32, device=z.device)
        mean = z.mean(1, keepdim=True)
    else:
        count = real.sum()
        z, scale = torch.where(real[:, :, None], z, 0.0), torch.where(real, scale, 0.0)
        mean = z.sum(1, keepdim=True) / real.sum(1).clamp(min=1)[:, None, None]
    rows = ((z - mean) * scale.sqrt()[:, :, None]).flatten(0, 1)
    gram = torch.zeros(units, units, dtype=torch.float32, device=z.device)
    blocks = weight.t().float().unflatten(0, (units, -1))
    for part in rows.split(_CHUNK):  # the outputs of single heads, of few rows at a time
        outputs = (part.unflatten(1, (units, -1)).transpose(0, 1) @ blocks).flatten(1)
        gram += outputs @ outputs.t()
    return {"gram": gram, "gram_count": count}


def gram_of_sums(sums: dict[str, Tensor]) -> Tensor:
    """The Gram matrix of all rows that the sums of `gram_sums` hold: [units, units]."""
    return sums["gram"] / sums["gram_count"]
