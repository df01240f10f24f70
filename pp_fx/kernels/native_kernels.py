"""The native kernels of a CPU (`native/kernels.cpp`): compiled at first use, called with plain pointers."""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BuildError
from ..native_library import NATIVE, NativeLibrary

NATIVE_SOURCES = Path(__file__).parent / "native"
LIBRARY = NativeLibrary("pp_fx_kernels", NATIVE_SOURCES / "kernels.cpp")
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""What they multiply, as they are told of it."""
_SIGNATURES = {
    "pp_fx_multiplies_pairs": "",
    "pp_fx_linear": "i p s p p s p p p s s s i",
    "pp_fx_coded_linear": "i i p p p p s s s i",
    "pp_fx_chosen_linear": "i p p s p p s p p p s s s s i",
    "pp_fx_columns": "i p s p s p s s i",
    "pp_fx_kept_rows_linear": "p s p s p p s s i",
    "pp_fx_strongest": "i p p p p s p p s p p s p p s p p s s s s s i",
}
_KINDS = {"i": ctypes.c_int, "p": ctypes.c_void_p, "s": ctypes.c_size_t}


@functools.cache
def native() -> Any:
    """The native kernels, compiled if need be; None, with one warning, where that cannot be done."""
    try:
        return signed(LIBRARY.find() or _build())
    except (BuildError, OSError) as error:
        warnings.warn(
            f"the native kernels are missing ({error}): decode='step' takes the dense model's time, and prompts gain "
            "less; install a C++ compiler",
            stacklevel=2,
        )
        return None


def signed(path: Path) -> Any:
    """A library of these kernels, which knows what their arguments are."""
    library = ctypes.CDLL(str(path))
    for name, signature in _SIGNATURES.items():
        getattr(library, name).argtypes = [_KINDS[kind] for kind in signature.split()]
    return library


def _build() -> Path:
    """With threads where the compiler has OpenMP."""
    try:
        return LIBRARY.build(flags=(*NATIVE, "-fopenmp"))
    except BuildError:
        return LIBRARY.build()


def pointer(tensor: Tensor | None) -> int | None:
    """Of a tensor's first number; None for None."""
    return None if tensor is None else tensor.data_ptr()


def as_read(scales: Tensor | None, zeros: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Scales and zeros of groups as the kernels read them, for inputs of this dtype; scales of rows as they are."""
    if scales is None or zeros is None:
        return scales, None
    return scales.to(dtype).contiguous(), zeros.contiguous()


def native_linear(
    library: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    """As `pp_fx.kernels.strongest.linear_rows`."""
    x = x.contiguous()
    scales, zeros = as_read(scales, zeros, x.dtype)
    y = x.new_empty(x.shape[0], weight.shape[0])
    library.pp_fx_linear(
        TYPES[x.dtype],
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
        torch.get_num_threads(),
    )
    return y
