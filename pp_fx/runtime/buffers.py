"""Tensors that outlive a call and keep their address: what CUDA graphs ask of a generation's state.

A compiled call under CUDA graphs overwrites its outputs at its next run, and copies every input whose address may
change. So what a generation keeps between calls is allocated outside of compiled regions, marked as a static address
(as transformers' StaticCache marks its keys and values), and written in place from then on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import StateError
from .cuda_graphs import compiles_cuda_graphs

RECORDED = ("cuda",)
"""Device types whose calls Inductor records; on others it leaves them as they are, whatever the mode."""


def keep(old: Tensor | None, value: Tensor, changed: Tensor | None = None) -> Tensor:
    """`value`, in the memory of `old` where it fits there.

    Args:
        old: what was kept before, or None.
        value: of any shape; of one like `old` (shape, dtype, device), `old` is written in place.
        changed: bool scalar on the device: where it is false, what `old` holds stays.

    Returns:
        The tensor to keep.

    Raises:
        StateError: new memory is needed inside a region that is compiled with CUDA graphs.
    """
    if old is None:
        return own(value)
    if changed is not None:
        value = torch.where(changed, value, old)
    if not _fits(old, value):
        return own(value)
    old.copy_(value)
    return old


def own(value: Tensor) -> Tensor:
    """A copy of `value` with an address of its own; in a compiled region (not of CUDA graphs) `value` itself."""
    if _learns(value):
        return value
    if torch.compiler.is_compiling():
        if value.device.type in RECORDED and compiles_cuda_graphs():
            raise StateError(
                "this call is compiled with CUDA graphs (mode='reduce-overhead'), which overwrite what a selection "
                "keeps on its KV cache; call pp_fx.cache.reserve(model, cache, batch) before the first call, or run "
                "the prompt uncompiled"
            )
        return value
    made: Tensor = allocate(value)
    return made


@torch.compiler.disable  # type: ignore[untyped-decorator]
def allocate(like: Tensor) -> Tensor:
    """A copy that torch.compile takes for one address; usable in and outside of inference mode."""
    with torch.inference_mode(False):
        made = like.clone()
    torch._dynamo.mark_static_address(made)
    return made


def _fits(old: Tensor, value: Tensor) -> bool:
    if old.shape != value.shape or old.dtype != value.dtype or old.device != value.device:
        return False
    if _learns(old) or _learns(value):
        return False
    # a compiled region knows no inference tensors
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not old.is_inference()


def _learns(tensor: Tensor) -> bool:
    """Gradients flow through it: it is kept as it is, since nothing may overwrite it."""
    return torch.is_grad_enabled() and tensor.requires_grad
