"""What calibration collects for one group: sums of z and z^2, the heads' Gram matrix, principal directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..runtime.history import by_position
from ..runtime.state import GroupState
from .directions import Directions
from .gram_sums import gram_of_sums, gram_sums
from .padding import add_padded


class Collected:
    """Sums over calibration batches, and what they make of a history (`runtime.state.Collector`).

    Attributes:
        sums: fp64, by name: what adds up over batches and processes.
        directions: principal directions of z; None where no compensation reads them.
    """

    def __init__(self, state: GroupState) -> None:
        self.state = state
        self.sums: dict[str, Tensor] = {}
        self.directions = None if state.directions is None else Directions(len(state.directions))

    def add(self, z: Tensor, residual: Tensor, real: Tensor | None, weight: Tensor) -> None:
        """A batch: z [B, T, C], residual [B, T, H], real bool [B, T] or None, output projection [H, C]."""
        if self.directions is not None:
            self.directions.add(z.flatten(0, 1), None if real is None else real.flatten())
        if self.state.gram is not None:
            for key, value in gram_sums(z, residual, real, weight, self.state.units).items():
                self.sums[key] = value.double() + self.sums.get(key, 0)
        per_position = self.state.energy is not None and self.state.energy.ndim == 2
        if per_position:
            z, real = by_position(z, real)
        z = z.float()
        if real is not None:
            z = torch.where(real.unsqueeze(-1), z, 0.0)
        dims = (0,) if per_position else (0, 1)
        counts = torch.ones(z.shape[:2], dtype=torch.float32, device=z.device) if real is None else real.float()
        for key, value in (("energy", z.pow(2).sum(dims)), ("count", counts.sum(dims)), ("mean", z.sum((0, 1)))):
            old = self.sums.get(key)
            self.sums[key] = value.double() if old is None else add_padded(old, value.double())

    def parts(self) -> tuple[dict[str, Tensor], Any]:
        """What `merge` takes, on the CPU."""
        sums = {key: value.cpu() for key, value in self.sums.items()}
        return sums, None if self.directions is None else self.directions.parts()

    def merge(self, parts: list[tuple[dict[str, Tensor], Any]]) -> None:
        """Take the place of the statistics of all processes, by their `parts`, this one's among them."""
        device = self.state.column.device
        sums: dict[str, Tensor] = {}
        for part, _ in parts:
            for key, value in part.items():
                sums[key] = value if key not in sums else add_padded(sums[key], value)
        self.sums = {key: value.to(device) for key, value in sums.items()}
        if self.directions is not None:
            merged = Directions(self.directions.rank)
            for _, directions in parts:
                merged.merge(directions, device)
            self.directions = merged

    def check_finite(self, batch: str) -> None:
        """After a batch.

        Raises:
            InputError: it gave activations that are not finite.
        """
        if not all(bool(value.isfinite().all()) for value in self.sums.values()):
            raise InputError(
                f"{batch} gives activations that are not finite (NaN or Inf) in {self.state.kind}; leave the batch out "
                "or run the model in a wider dtype"
            )

    def commit(self) -> None:
        """Make them the group's history.

        Raises:
            InputError: there was no real token.
        """
        state = self.state
        if state.energy is None or state.mean is None:
            return
        count = self.sums["count"]
        total = count.sum()
        if total == 0:
            raise InputError("batches holds padding alone; give at least one real token")
        energy = self.sums["energy"] / count.clamp(min=1).unsqueeze(-1)
        with torch.inference_mode(False), torch.no_grad():
            if state.energy.ndim == 2:
                rows = min(len(energy), len(state.energy))
                # positions never seen take the mean over the seen ones
                state.energy.copy_((self.sums["energy"].sum(0) / total).expand_as(state.energy))
                known = count[:rows] > 0
                state.energy[:rows][known] = energy[:rows][known].to(state.energy.dtype)
            else:
                state.energy.copy_(energy)
            state.mean.copy_(self.sums["mean"] / total)
            if state.gram is not None:
                state.gram.copy_(gram_of_sums(self.sums))
            if state.directions is not None and self.directions is not None:
                found = self.directions.directions()
                state.directions.zero_()
                if found is not None:
                    state.directions[: len(found)].copy_(found)
            state.seen.fill_(1.0)
        state.calibrated = True
