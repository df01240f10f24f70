"""Probe Pruning for transformers models, as torch.fx graph passes (arXiv 2502.15618)."""

from . import errors
from .calibrate import calibrate
from .config import ProbeConfig, ProbePruningConfig
from .explain import explain
from .history import history_frozen
from .transform import is_transformed, restore, transform

__all__ = [
    "ProbeConfig",
    "ProbePruningConfig",
    "calibrate",
    "errors",
    "explain",
    "history_frozen",
    "is_transformed",
    "restore",
    "transform",
]
__version__ = "0.1.0"
