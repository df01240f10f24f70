"""Export of transformed models: `onnx` writes a folder, `check` compares it with torch, `OrtModel` runs it.

Needs the extra `pp_fx[onnxruntime]`; nothing of it is imported before the first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..errors import ExportError

if TYPE_CHECKING:
    from .agreement import Check, check
    from .folder import check_target
    from .native_ops import build_ort_ops
    from .node_placement import placement
    from .ort_cache import OrtCache
    from .ort_model import OrtModel
    from .to_onnx import onnx

__all__ = ["Check", "OrtCache", "OrtModel", "build_ort_ops", "check", "check_target", "onnx", "placement"]
_HOME = {
    "onnx": "to_onnx",
    "check": "agreement",
    "check_target": "folder",
    "build_ort_ops": "native_ops",
    "Check": "agreement",
    "OrtModel": "ort_model",
    "OrtCache": "ort_cache",
    "placement": "node_placement",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    try:
        found = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ExportError(
            f"pp_fx.export needs the package {error.name}; run: pip install 'pp-fx[onnxruntime]'"
        ) from None
    return found
