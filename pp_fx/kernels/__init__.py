"""Kept rows, and products with them as torch.library operators, which compilers leave whole; Triton kernels on CUDA."""

from .drop_jointly import drop_jointly
from .few_rows import few_rows
from .gather_linear import gather_linear, gather_output, kept_rows, large
from .native_kernels import NATIVE_SOURCES
from .solve import solve
from .top import top

__all__ = [
    "NATIVE_SOURCES",
    "drop_jointly",
    "few_rows",
    "gather_linear",
    "gather_output",
    "kept_rows",
    "large",
    "solve",
    "top",
]
