"""Probe Pruning for transformers models, as torch.fx graph passes (arXiv 2502.15618).

The rooms, lower ones first; none imports a higher one (docs/architecture.md):

`kernels` < `methods` < `config` < `runtime` < `capture`, `groups` < `passes` < `rewrite` < `calibration` <
`measure`, `integrations` < `export` < `cli`
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import errors, requirements  # noqa: F401  (checked before the imports below use them)
from ._version import __version__ as __version__
from .calibration.calibrate import calibrate
from .config import ProbePruningConfig
from .integrations import register
from .integrations.hf_config import ProbePruningHfConfig
from .integrations.to_torchao import to_torchao
from .probe_config import ProbeConfig
from .rewrite.layer import is_transformed
from .rewrite.transform import restore, transform
from .runtime.modes import history_frozen

if TYPE_CHECKING:
    from . import bench, cache, evaluate, export, macs, models, text  # noqa: F401
    from .measure.allocate import allocate
    from .measure.compare import compare
    from .measure.explain import explain
    from .measure.report import report

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
    "to_torchao",
    "transform",
]
register()


_FACES = ("bench", "cache", "evaluate", "export", "macs", "models", "text")


_MEASURES = ("allocate", "compare", "explain", "report")
"""Functions of the files of these names in `measure`."""


def __getattr__(name: str) -> Any:
    """What a plain `import pp_fx` need not load: `pp_fx.cache`, `pp_fx.export`, `pp_fx.explain`, .., on first use."""
    if name in _FACES:
        return importlib.import_module(f".{name}", __name__)
    if name in _MEASURES:
        return getattr(importlib.import_module(f".measure.{name}", __name__), name)
    raise AttributeError(f"module {__name__} has no attribute {name!r}")
