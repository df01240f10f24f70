"""Triton kernels for CUDA devices, behind torch.library operators that every device and compiler understands."""

from .gather_linear import gather_linear, gather_output

__all__ = ["gather_linear", "gather_output"]
