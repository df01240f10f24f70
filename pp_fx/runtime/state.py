"""What one group of one layer remembers: its sizes, a number for each column of the output projection, the history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..config import Kind, ProbePruningConfig
from ..kernels.coded import Coded
from ..layouts import codes_of
from ..methods import SCORES, column_sum
from ..shards import Shards
from .names import rows_name
from .selections import Selection

HISTORY_BUFFERS = {"energy": True, "mean": True, "directions": False, "gram": True, "seen": True}
"""Buffers of a GroupState that are its history, and whether prompts update them or calibration alone."""

_OUTPUT = ("output_codes", "output_scales", "output_zeros")


class Collector(Protocol):
    """Who takes the statistics of dense forward passes (`pp_fx.calibration.collect`)."""

    def add(self, z: Tensor, residual: Tensor, real: Tensor | None, weight: Tensor) -> None:
        """A batch: z [B, T, C], residual [B, T, H], real bool [B, T] or None, output projection [H, C]."""


class GroupState(nn.Module):
    """State of a group. All statistics are fp32 whatever the model's dtype; nothing of it enters `state_dict()`.

    Attributes:
        kind: "mlp" or "attention".
        units, width: heads (or channels) and input columns of the output projection per head (1 for channels).
        kept_units: how many units a selection keeps; a fixed Python int, so that every shape is static.
        step_units: how many channels each token of a decode step runs; all where tokens do not choose for themselves.
        coded: of a gated MLP that ranks by one, the copy of its gate projection's weight (`pp_fx.kernels.coded`).
        output_codes, output_scales, output_zeros: a copy of a quantized output projection, transposed, of which the
            tokens of decode steps read rows (`Codes.transposed`: int8 [C, H]); None without steps, and of a weight that
            lies so itself.
        column_norm: fp32 [C], the norm of each channel's column of the output projection; None without steps.
        factor: of a gated MLP, gate projection [.., C] -> what the up projection is multiplied by.
        column: fp32 [units, width], what the score precomputes of the output projection.
        reach: fp32 [H], the squared column norms of the input projections; None where the probe does not rank by them.
        energy: fp32 [C] (history="channel"), [history_length, C] ("position") or None: running mean of z^2.
        mean: fp32 [C], running mean of z, or None without history.
        directions: bf16 [r, C], principal directions of z from calibration, zeros before; None where no compensation
            reads them.
        kv_head: int64 [units], the key/value head of every query head; None for channels.
        rows_0, rows_1, ..: int64, where the rows of an input projection lie scattered in a fused weight.
        gram: fp32 [units, units], running mean of the Gram matrix of the heads' outputs (`head_gram`); None where no
            score reads it.
        seen: fp32 scalar, 0 until the first batch or calibration, then 1.
        calibrated: whether `calibrate` has set the history.
        held: under continuous batching what the history alone has selected, once and for all; None before.
        reprobes: whether decoding probes this group again.
        holds_compact: whether decoding keeps compact weights of this group on the KV cache.
        mode: "run", "frozen" (select, but leave the history), "calibrate" (dense, collect statistics).
        collector: who takes the statistics of mode "calibrate".
        shards: of a tensor parallel model, which shard of the units this process holds; None where it holds all.
    """

    column: Tensor
    column_norm: Tensor | None
    output_codes: Tensor | None
    output_scales: Tensor | None
    output_zeros: Tensor | None
    gate_codes: Tensor | None
    gate_scales: Tensor | None
    reach: Tensor | None
    energy: Tensor | None
    mean: Tensor | None
    directions: Tensor | None
    gram: Tensor | None
    seen: Tensor
    kv_head: Tensor | None

    def __init__(
        self,
        kind: Kind,
        units: int,
        width: int,
        kept_units: int,
        settings: ProbePruningConfig,
        weight: Tensor,
        probe: Callable[..., Tensor],
        kv_head: tuple[int, ...] | None = None,
        rows: dict[int, tuple[int, ...]] | None = None,
        reprobes: bool = False,
        step_units: int | None = None,
        factor: Callable[..., Tensor] | None = None,
        reach: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.units, self.width, self.kept_units = units, width, kept_units
        self.step_units = units if step_units is None else step_units
        self.probe, self.factor = probe, factor
        self.held: Selection | None = None
        self.calibrated = False
        self.reprobes = settings.reprobes and reprobes and self.prunes
        self.holds_compact = settings.decode != "dense" and not settings.steps
        self.mode: Literal["run", "frozen", "calibrate"] = "frozen" if settings.freeze_history else "run"
        self.score, self.compensation = settings.of_kind(kind)
        self.collector: Collector | None = None
        self.shards: Shards | None = None
        columns = units * width
        device = weight.device
        sizes = {"channel": (columns,), "position": (settings.history_length, columns), None: None}[settings.history]
        if not self.prunes:
            sizes = None

        def buffer(key: str, value: Tensor | None) -> None:
            self.register_buffer(key, value, persistent=False)

        with torch.inference_mode(False):
            buffer("column", self._column(weight) if self.prunes else None)
            buffer("column_norm", _norms(weight) if self.steps else None)
            for key in (*_OUTPUT, "gate_codes", "gate_scales"):
                buffer(key, None)
            buffer("reach", reach if self.prunes else None)
            buffer("energy", None if sizes is None else torch.zeros(sizes, device=device))
            buffer("mean", None if sizes is None else torch.zeros(columns, device=device))
            ranked = sizes is not None and self.compensation == "least_squares"
            rank = min(settings.compensation_rank, columns)
            buffer("directions", torch.zeros(rank, columns, dtype=torch.bfloat16, device=device) if ranked else None)
            paired = sizes is not None and self.reads_gram
            buffer("gram", torch.zeros(units, units, device=device) if paired else None)
            buffer("seen", torch.zeros((), device=device) if self.prunes else None)
            buffer("kv_head", None if kv_head is None else torch.tensor(kv_head, device=device))
            for position, part in (rows or {}).items():
                buffer(rows_name(position), torch.tensor(part, device=device))

    @property
    def prunes(self) -> bool:
        """Whether this layer drops anything here."""
        return self.kept_units < self.units

    @property
    def calibrated(self) -> bool:
        return self._calibrated

    @calibrated.setter
    def calibrated(self, value: bool) -> None:
        self._calibrated, self.held = value, None  # another history selects otherwise

    @property
    def steps(self) -> bool:
        """Whether every token of a decode step chooses for itself."""
        return self.step_units < self.units

    @property
    def reads_gram(self) -> bool:
        """Whether the score looks at how the heads meet in the output."""
        return self.prunes and SCORES[self.score].gram

    @property
    def coded(self) -> Coded | None:
        """The copy of the gate that ranks, if one does."""
        return None if self.gate_codes is None else Coded(self.gate_codes, self.gate_scales)  # type: ignore[arg-type]

    def refresh(self, weight: Tensor, reach: Tensor | None, coded: Coded | None = None) -> None:
        """Recompute what depends on the output projection's weight [H, C], take the others: after load_state_dict."""
        if weight.is_meta:
            return
        with torch.inference_mode(False):
            if self.prunes:
                self.column, self.reach = self._column(weight), reach
            if self.steps:
                self.column_norm = _norms(weight)
                self.gate_codes, self.gate_scales = coded or (None, None)
                codes = codes_of(weight.detach()) if weight.device.type == "cpu" else None
                parts = (None, None, None) if codes is None else codes.transposed()
                self.output_codes, self.output_scales, self.output_zeros = parts

    def _column(self, weight: Tensor) -> Tensor:
        return SCORES[self.score].column(weight).view(self.units, self.width)

    def columns_of(self, kept: Tensor) -> Tensor:
        """Input columns of the output projection that the kept units own: int64 [len(kept) * width]."""
        if self.width == 1:
            return kept
        return (kept[:, None] * self.width + torch.arange(self.width, device=kept.device)).flatten()

    def history(self, learned: bool = False) -> dict[str, Tensor]:
        """The buffers that are the history, by name; `learned`: those alone that prompts update."""
        found = {name: self._buffers[name] for name, learns in HISTORY_BUFFERS.items() if learns or not learned}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupState:
        """`.to`, `.half`, `.cuda`: move the statistics, keep them fp32."""
        for key, tensor in self._buffers.items():
            if tensor is not None:
                self._buffers[key] = tensor.to(fn(tensor[..., :0] if tensor.ndim else tensor).device)
        return self

    def extra_repr(self) -> str:
        return f"{self.kind}: {self.kept_units} of {self.units} kept"


def _norms(weight: Tensor) -> Tensor:
    return column_sum(weight, 2).sqrt()


def states_of(model: nn.Module) -> list[GroupState]:
    """Every GroupState of a transformed model, in layer order."""
    return [m for m in model.modules() if isinstance(m, GroupState)]
