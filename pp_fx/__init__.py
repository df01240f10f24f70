"""Probe Pruning for transformers models, as torch.fx graph passes (arXiv 2502.15618)."""

import importlib
from typing import TYPE_CHECKING, Any

from . import errors, requirements  # noqa: F401  (checked before the imports below use them)
from .allocate import allocate
from .calibrate import calibrate
from .compare import compare
from .config import ProbeConfig, ProbePruningConfig
from .explain import explain
from .hf_quantizer import ProbePruningHfConfig, register
from .history import history_frozen
from .report import report
from .transform import is_transformed, restore, transform

if TYPE_CHECKING:
    from . import export

__all__ = [
    "ProbeConfig",
    "ProbePruningConfig",
    "ProbePruningHfConfig",
    "allocate",
    "calibrate",
    "compare",
    "errors",
    "explain",
    "export",
    "history_frozen",
    "is_transformed",
    "report",
    "restore",
    "transform",
]
__version__ = "0.1.0"
register()


def __getattr__(name: str) -> Any:
    """`pp_fx.export` on first use: a plain `import pp_fx` loads nothing of it."""
    if name == "export":
        return importlib.import_module(".export", __name__)
    raise AttributeError(f"module {__name__} has no attribute {name!r}")
