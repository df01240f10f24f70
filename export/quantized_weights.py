"""Weights of an exported file in 4 or 8 bits: how they are rounded, and which weight is held how.

Rows of codes with a scale for each block of 32 numbers, as MatMulNBits and GatherBlockQuantized read them:
a kept row goes with its scales. Output projections of pruned groups lie transposed, a channel's row of int8 numbers,
with one scale for each output feature: a kept channel takes its numbers along, and the scales are those of the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..rewrite.layer import input_reach, layers_of, output_weight
from ..runtime.modes import put_back
from ..runtime.names import LAYER

BLOCK = 32
"""Numbers that share a scale."""
BITS = {"int8": 8, "int4": 4}
_HEAD_BITS = 8
"""Of embeddings and LM head, whatever the layers have: errors there reach every logit."""
_SHARES = {8: (1.0,), 4: (0.8, 0.85, 0.9, 0.95, 1.0, 1.07, 1.14)}
"""Scales that are tried, over the one that just holds a block's largest number; the least squared error decides."""
_LOSSY = 0.25
"""Root of the mean squared error of a weight, over that of its numbers, above which an export is refused."""


@dataclass(frozen=True)
class QuantizedRows:
    """A weight [N, K] in blocks along its rows.

    Attributes:
        codes: uint8 [N, K / 32, 32] of 8 bits, [N, K / 32, 16] of 4 bits (the even one of two lower).
        scales: fp32 [N, K / 32]; a number is (code - 2^(bits - 1)) * scale.
    """

    codes: Tensor
    scales: Tensor

    @property
    def bits(self) -> int:
        return self.codes.shape[-1] * 8 // BLOCK

    @classmethod
    def of(cls, weight: Tensor, bits: int) -> QuantizedRows:
        """Rounds a weight [N, K], K a multiple of 32."""
        limit = 1 << (bits - 1)
        blocks = weight.detach().float().unflatten(1, (-1, BLOCK))
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        least = torch.full_like(extreme, torch.inf)
        codes, scales = torch.zeros_like(blocks), torch.zeros_like(extreme)
        for share in _SHARES[bits]:
            scale = extreme * (-share / limit)  # the largest number has the code -limit, whatever its sign
            inverse = torch.where(scale == 0, 0, 1 / scale)
            tried = (blocks * inverse).round().clamp(-limit, limit - 1)
            error = (tried * scale - blocks).square().sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            codes, scales = torch.where(better, tried, codes), torch.where(better, scale, scales)
        numbers = (codes + limit).to(torch.uint8)
        if bits == 4:
            numbers = numbers[..., ::2] | numbers[..., 1::2] << 4
        return cls(numbers.contiguous(), scales.squeeze(-1).contiguous())

    def widened(self) -> Tensor:
        """fp32 [N, K]."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        numbers = codes.float() - (1 << (self.bits - 1))
        return (numbers * self.scales[..., None]).flatten(1)


@dataclass(frozen=True)
class QuantizedColumns:
    """A weight [O, C] by its columns.

    Attributes:
        codes: int8 [C, O].
        scales: fp32 [O].
    """

    codes: Tensor
    scales: Tensor
    bits = 8

    @classmethod
    def of(cls, weight: Tensor) -> QuantizedColumns:
        """Rounds a weight [O, C]."""
        weight = weight.detach().float()
        scales = weight.abs().amax(1) / 127
        inverse = torch.where(scales == 0, 0, 1 / scales)
        return cls((weight * inverse[:, None]).round().to(torch.int8).t().contiguous(), scales)

    def widened(self) -> Tensor:
        """fp32 [O, C]."""
        return self.codes.t().float() * self.scales[:, None]


Quantized = QuantizedRows | QuantizedColumns


def widened(codes: Tensor, scales: Tensor) -> Tensor:
    """A weight [out, in] in fp32 out of its two parts."""
    made = QuantizedRows(codes, scales) if codes.ndim == 3 else QuantizedColumns(codes, scales)
    return made.widened()


def quantize(model: Any, weights: str) -> dict[str, Quantized]:
    """The linear weights of a transformed model, rounded ("int8", "int4"), by parameter name (of a tied one the first).

    Embeddings and LM head have 8 bits, and so have the output projections of pruned groups.

    Raises:
        ExportError: a weight cannot be held so, or loses more than a quarter of its size.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    outputs = _outputs(model)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    found: dict[str, Quantized] = {}
    for module in dict.fromkeys((*ends, *(m for layer in layers_of(model) for m in layer.modules()))):
        if not isinstance(module, nn.Linear) and module not in ends:
            continue
        weight = module.weight
        name = names[id(weight)]
        if name in found:
            continue
        if id(weight) in outputs:
            found[name] = QuantizedColumns.of(weight)
        elif weight.shape[1] % BLOCK:
            raise ExportError(
                f"weights={weights!r} needs rows of a multiple of {BLOCK} numbers, {name} has {weight.shape[1]}; leave "
                "weights out"
            )
        else:
            found[name] = QuantizedRows.of(weight, _HEAD_BITS if module in ends else BITS[weights])
        _check_loss(name, weight, found[name])
    return found


def _outputs(model: Any) -> set[int]:
    """Ids of the output projections' weights of all pruned groups."""
    found = set()
    for layer in layers_of(model):
        for kind, state in layer.states().items():
            if not (state.prunes or state.steps):
                continue
            group = layer.groups[kind]
            if group.output.transposed or any(part.transposed for part in group.inputs):
                raise ExportError(
                    "weights= is for linear layers whose weight is [out, in]; this model's lie transposed (Conv1D): "
                    "leave weights out"
                )
            if any(part.rows is not None for part in group.inputs):
                raise ExportError(
                    f"weights= needs projections of their own, {group.inputs[0].path} is several in one; leave "
                    "weights out"
                )
            found.add(id(layer.get_parameter(group.output.path)))
    return found


def _check_loss(name: str, weight: Tensor, made: Quantized) -> None:
    size = weight.detach().float().square().mean().sqrt()
    error = ((made.widened() - weight.detach()).square().mean().sqrt() / size).item() if size != 0 else 0.0
    if not error <= _LOSSY:
        raise ExportError(
            f"{name} loses {error:.0%} of its size in {made.bits} bits (at most {_LOSSY:.0%} is allowed); export with "
            "weights='int8', or leave weights out"
        )


@contextlib.contextmanager
def rounded_weights(model: nn.Module, quantized: dict[str, Quantized]) -> Iterator[None]:
    """Inside, the model has the numbers that the file will hold, and what its states know of them is of these."""
    parameters, layers = dict(model.named_parameters()), layers_of(model)
    before = {name: parameters[name].data for name in quantized}
    states = [state for layer in layers for state in layer.states().values()]
    try:
        with put_back(states, "column", "reach", "column_norm"):
            for name, made in quantized.items():
                parameters[name].data = made.widened().to(before[name])
            for layer in layers if quantized else ():
                settings = layer.__dict__[LAYER].settings
                for kind, state in layer.states().items():
                    group = layer.groups[kind]
                    state.refresh(output_weight(layer, group), input_reach(layer, group, settings))
            yield
    finally:
        for name, data in before.items():
            parameters[name].data = data
