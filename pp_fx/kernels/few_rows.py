"""The linear layers of a probe, a few rows of the batch: `pp_fx::few_rows`.

Such a product reads a whole weight for little work. On a CPU that multiplies pairs of bf16 (AVX512_BF16) our own kernel
reads it at the memory's speed for up to a dozen rows, where oneDNN takes up to four times as long
(docs/research/speed.md, section 7). Everything else is torch's own product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts import is_plain
from .native_kernels import native, native_linear

MOST_ROWS = 16
"""With more the two are equal."""


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` for the rows of a probe.

    Args:
        x: [..., H].
        weight: [C, H], or quantized (`pp_fx.layouts`).
        bias: [C] or None.

    Returns:
        [..., C].
    """
    learns = torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)
    halves = x.dtype == torch.bfloat16 and weight.device.type == "cpu" and is_plain(weight) and weight.dtype == x.dtype
    if not halves or learns or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    made: Tensor = torch.ops.pp_fx.few_rows(x.flatten(0, -2), weight, bias)
    return made.unflatten(0, x.shape[:-1])


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    library: Any = native() if 0 < x.shape[0] <= MOST_ROWS and weight.stride(1) == 1 else None
    if library is None or not library.pp_fx_multiplies_pairs():
        return F.linear(x, weight, bias)
    return native_linear(library, x, weight, bias)


_library = torch.library.Library("pp_fx", "FRAGMENT")
_library.define("few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("few_rows", F.linear, "CompositeExplicitAutograd")
_library.impl("few_rows", _native, "CPU")
_library.impl("few_rows", lambda x, weight, _: x.new_empty(x.shape[0], weight.shape[0]), "Meta")
