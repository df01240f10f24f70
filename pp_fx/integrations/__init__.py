"""The doors of other libraries: transformers' `save_pretrained` and `from_pretrained`, optimum's command line."""

from . import continuous_batching, saving  # noqa: F401  (methods of transformed models)
from .hf_quantizer import register

__all__ = ["register"]
