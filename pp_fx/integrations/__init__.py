"""The doors of other libraries: transformers' `save_pretrained` and `from_pretrained`, optimum's command line."""

from . import saving  # noqa: F401  (transformed models save themselves with it)
from .hf_quantizer import register

__all__ = ["register"]
