"""The MLP of a decode step over each token's strongest channels: `pp_fx::linear_rows` and `pp_fx::strongest`.

On a CPU they are native kernels (`native/kernels.cpp`, compiled at first use), on CUDA, for one token, Triton's: they
read a channel's weights where they lie and only if a token has chosen it. Elsewhere, for more tokens than pay, and
where gradients are asked for, torch's own products run whole and what is not chosen is masked: the same numbers for the
time of the dense model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .native_kernels import TYPES, as_read, native, native_linear, pointer

MOST_TOKENS = 8
"""Of a call for the kernels: with more, nearly every channel is chosen by some token."""


def serves(weight: Tensor, tokens: int) -> bool:
    """Whether kernels of our own run a call of so many tokens with weights like this one."""
    device = weight.device.type
    return (
        device in ("cpu", "cuda")
        and weight.dtype in TYPES
        and tokens <= MOST_TOKENS
        and not (torch.is_grad_enabled() and weight.requires_grad)
        and not torch.is_autocast_enabled(device)
    )


def linear_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None, zeros: Tensor | None = None
) -> Tensor:
    """A linear layer of few tokens.

    Args:
        x: [N, H], fp32, fp16 or bf16.
        weight: [C, H] whose rows are contiguous, of x's dtype; int8 with scales.
        bias: [C] or None.
        scales: of int8 numbers, fp32 [C], for each row; with zeros [C, G], for each of its G groups of equal size.
        zeros: int8 [C, G], what is taken off a group's numbers; or None.

    Returns:
        [N, C].
    """
    return torch.ops.pp_fx.linear_rows(x, weight, bias, scales, zeros)


def strongest(
    strength: Tensor,
    factor: Tensor,
    x: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    count: int,
    up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    up_zeros: Tensor | None = None,
    down_zeros: Tensor | None = None,
) -> Tensor:
    """sum over a token's chosen channels c of factor_c * (x . up_c) * down_c.

    Chosen are the channels that are at least as strong as the token's `count`-th strongest (so a few more where
    several are equal; one token on CUDA takes the first of these).

    Args:
        strength: fp32 [N, C], at least 0.
        factor: [N, C]: what meets the up projection; without one, the output projection's input.
        x: [N, H].
        up, up_bias: [C, H] whose rows are contiguous, and [C]; or None.
        down, down_bias: [C, O], the output projection's weight transposed, with contiguous rows; [O] or None.
        count: in [1, C].
        up_scales, down_scales: of weights that are int8, both: fp32 [C] and [O], or with zeros [C, G] and [G', O].
        up_zeros, down_zeros: int8 [C, G] and [G', O], of both, what is taken off the numbers of a group of input
            features; or None.

    Returns:
        [N, O].
    """
    scaling = up_scales, down_scales, up_zeros, down_zeros
    return torch.ops.pp_fx.strongest(strength, factor, x, up, up_bias, down, down_bias, count, *scaling)


def chosen_rows(
    strength: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: int,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    """A linear layer's results for each token's chosen channels, 0 for the others.

    Args:
        strength: fp32 [N, C], at least 0.
        x: [N, H].
        weight, bias, scales, zeros: as of `linear_rows`.
        count: in [1, C].

    Returns:
        [N, C].
    """
    return torch.ops.pp_fx.chosen_rows(strength, x, weight, bias, count, scales, zeros)


def masked(strength: Tensor, z: Tensor, count: int) -> Tensor:
    """z [N, C] with 0 for what is not among a token's strongest channels."""
    least = strength.kthvalue(strength.shape[-1] - count + 1, -1, keepdim=True).values
    return torch.where(strength >= least, z, 0.0)


_SCALING = "Tensor? scales=None, Tensor? zeros=None"
_library = torch.library.Library("pp_fx", "FRAGMENT")
_library.define(f"linear_rows(Tensor x, Tensor weight, Tensor? bias, {_SCALING}) -> Tensor")
_library.define(f"chosen_rows(Tensor strength, Tensor x, Tensor weight, Tensor? bias, int count, {_SCALING}) -> Tensor")
_library.define(
    "strongest(Tensor strength, Tensor factor, Tensor x, Tensor? up, Tensor? up_bias, Tensor down, Tensor? down_bias, "
    "int count, Tensor? up_scales=None, Tensor? down_scales=None, Tensor? up_zeros=None, Tensor? down_zeros=None) "
    "-> Tensor"
)


def _plain_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None, zeros: Tensor | None = None
) -> Tensor:
    if scales is None:
        return F.linear(x, weight, bias)
    if zeros is None:
        made = F.linear(x, weight.to(x.dtype)) * scales.to(x.dtype)
        return made if bias is None else made + bias
    groups = weight.to(x.dtype).unflatten(1, (zeros.shape[1], -1)) - zeros.to(x.dtype)[..., None]
    return F.linear(x, (groups * scales.to(x.dtype)[..., None]).flatten(1), bias)


def plain_strongest(
    strength: Tensor,
    factor: Tensor,
    x: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    count: int,
    up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    up_zeros: Tensor | None = None,
    down_zeros: Tensor | None = None,
) -> Tensor:
    """As `strongest`, by torch's own products, which have gradients: everything runs, what is not chosen is masked."""
    z = factor if up is None else factor * _plain_linear(x, up, up_bias, up_scales, up_zeros)
    if down_scales is not None and down_zeros is not None:
        down_scales, down_zeros = down_scales.t(), down_zeros.t()
    return _plain_linear(masked(strength, z, count), down.t(), down_bias, down_scales, down_zeros)


def _plain_chosen(
    strength: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, count: int, *scaling: Tensor | None
) -> Tensor:
    return masked(strength, _plain_linear(x, weight, bias, *scaling), count)


def _native_chosen(
    strength: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: int,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    library = native()
    if library is None or weight.stride(1) != 1:
        return _plain_chosen(strength, x, weight, bias, count, scales, zeros)
    strength, x = strength.float().contiguous(), x.contiguous()
    scales, zeros = as_read(scales, zeros, x.dtype)
    y = x.new_empty(strength.shape)
    library.pp_fx_chosen_linear(
        TYPES[x.dtype],
        strength.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        pointer(scales),
        pointer(zeros),
        0 if zeros is None else weight.shape[1] // zeros.shape[1],
        pointer(bias),
        x.data_ptr(),
        y.data_ptr(),
        *y.shape,
        x.shape[1],
        count,
        torch.get_num_threads(),
    )
    return y


def _native_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *scaling: Tensor | None) -> Tensor:
    library = native()
    if library is None or weight.stride(1) != 1:
        return _plain_linear(x, weight, bias, *scaling)
    return native_linear(library, x, weight, bias, *scaling)


def _native_strongest(
    strength: Tensor,
    factor: Tensor,
    x: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    count: int,
    up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    up_zeros: Tensor | None = None,
    down_zeros: Tensor | None = None,
) -> Tensor:
    library = native()
    if library is None or down.stride(1) != 1 or (up is not None and up.stride(1) != 1):
        scaling = up_scales, down_scales, up_zeros, down_zeros
        return plain_strongest(strength, factor, x, up, up_bias, down, down_bias, count, *scaling)
    strength, factor, x = strength.float().contiguous(), factor.contiguous(), x.contiguous()
    up_scales, up_zeros = as_read(up_scales, up_zeros, x.dtype)
    down_scales, down_zeros = as_read(down_scales, down_zeros, x.dtype)
    y = x.new_empty(x.shape[0], down.shape[1])
    library.pp_fx_strongest(
        TYPES[x.dtype],
        strength.data_ptr(),
        factor.data_ptr(),
        x.data_ptr(),
        pointer(up),
        0 if up is None else up.stride(0),
        pointer(up_scales),
        pointer(up_zeros),
        0 if up_zeros is None else x.shape[1] // up_zeros.shape[1],
        pointer(up_bias),
        down.data_ptr(),
        down.stride(0),
        pointer(down_scales),
        pointer(down_zeros),
        0 if down_zeros is None else down.shape[0] // down_zeros.shape[0],
        pointer(down_bias),
        y.data_ptr(),
        *strength.shape,
        x.shape[1],
        y.shape[1],
        count,
        torch.get_num_threads(),
    )
    return y


def _cuda_strongest(
    strength: Tensor, factor: Tensor, x: Tensor, up: Any, up_bias: Any, down: Tensor, *more: Any
) -> Tensor:
    from .triton_strongest import strongest as kernel
    from .triton_top import LARGEST

    rows = down.stride(1) == 1 and (up is None or up.stride(1) == 1)  # contiguous, as the kernels read them
    if rows and strength.shape[1] <= LARGEST and down.dtype == x.dtype:
        made: Tensor = kernel(strength, factor, x, up, up_bias, down, *more[:2])
        return made
    return plain_strongest(strength, factor, x, up, up_bias, down, *more)


for _name, _plain, _cpu in (
    ("linear_rows", _plain_linear, _native_linear),
    ("chosen_rows", _plain_chosen, _native_chosen),
    ("strongest", plain_strongest, _native_strongest),
):
    _library.impl(_name, _plain, "CompositeExplicitAutograd")
    _library.impl(_name, _cpu, "CPU")
_library.impl("strongest", _cuda_strongest, "CUDA")
_library.impl("chosen_rows", lambda strength, x, weight, bias, count, *_: x.new_empty(strength.shape), "Meta")
_library.impl("linear_rows", lambda x, weight, bias, *_: x.new_empty(x.shape[0], weight.shape[0]), "Meta")
_library.impl("strongest", lambda s, f, x, u, ub, down, *_: x.new_empty(x.shape[0], down.shape[1]), "Meta")
