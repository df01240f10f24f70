"""Products with kept rows as torch.library operators, which compilers leave whole; Triton kernels on CUDA."""

from .gather_linear import gather_linear, gather_output, large

__all__ = ["gather_linear", "gather_output", "large"]
