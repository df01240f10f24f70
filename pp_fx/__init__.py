"""Probe Pruning for transformers models, as torch.fx graph passes (arXiv 2502.15618)."""

from . import errors
from .allocate import allocate
from .calibrate import calibrate
from .compare import compare
from .config import ProbeConfig, ProbePruningConfig
from .explain import explain
from .history import history_frozen
from .transform import is_transformed, restore, transform

__all__ = [
    "ProbeConfig",
    "ProbePruningConfig",
    "allocate",
    "calibrate",
    "compare",
    "errors",
    "explain",
    "history_frozen",
    "is_transformed",
    "restore",
    "transform",
]
__version__ = "0.1.0"
