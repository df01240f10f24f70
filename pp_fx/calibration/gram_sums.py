"""The Gram matrix of the heads' outputs over all calibration text, as sums that batches and processes add to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import widened
from ..runtime.head_gram import TINY

_CHUNK = 256


def gram_sums(z: Tensor, residual: Tensor, real: Tensor | None, weight: Tensor, units: int) -> dict[str, Tensor]:
    """What `gram_of_sums` needs of a batch, z [B, T, C] and residual [B, T, H]: sums over sequences and their rows.

    As `output_gram`, but the means are those of each sequence: a batch's own means are compensated, too.
    """
    z, scale = z.float(), residual.float().square().mean(-1).clamp(min=TINY).reciprocal()
    if real is None:
        count = torch.tensor(float(scale.numel()), dtype=torch.float32, device=z.device)
        mean = z.mean(1, keepdim=True)
    else:
        count = real.sum()
        z, scale = torch.where(real[:, :, None], z, 0.0), torch.where(real, scale, 0.0)
        mean = z.sum(1, keepdim=True) / real.sum(1).clamp(min=1)[:, None, None]
    rows = ((z - mean) * scale.sqrt()[:, :, None]).flatten(0, 1)
    gram = torch.zeros(units, units, dtype=torch.float32, device=z.device)
    blocks = widened(weight).t().float().unflatten(0, (units, -1))
    for part in rows.split(_CHUNK):  # the outputs of single heads, of few rows at a time
        outputs = (part.unflatten(1, (units, -1)).transpose(0, 1) @ blocks).flatten(1)
        gram += outputs @ outputs.t()
    return {"gram": gram, "gram_count": count}


def gram_of_sums(sums: dict[str, Tensor]) -> Tensor:
    """The Gram matrix of all rows that the sums of `gram_sums` hold: [units, units]."""
    return sums["gram"] / sums["gram_count"]
