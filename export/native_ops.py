"""The native kernels of the `pp_fx` operators: building the library, and finding the one that was built."""

from __future__ import annotations

from pathlib import Path

from ..errors import BuildError, ExportError
from ..kernels import NATIVE_SOURCES
from ..native_library import NATIVE, NativeLibrary

LIBRARY = NativeLibrary("pp_fx_ops", Path(__file__).parent / "native" / "ops.cpp", NATIVE_SOURCES)


def build_ort_ops(*, compiler: str | None = None, flags: tuple[str, ...] = NATIVE) -> Path:
    """Compile the native CPU kernels for this machine, once; `OrtModel` finds the library by itself.

    Any onnxruntime from 1.18 on loads it: `SessionOptions.register_custom_ops_library(path)` in Python,
    `RegisterCustomOpsLibrary` in C. Without it the operators run their function bodies. onnxruntime's headers are not
    needed.

    Args:
        compiler: GCC 12 or Clang 15 or later, by name or path; by default $CXX or the first one found.
        flags: more compiler flags.

    Returns:
        The library, in the user's cache folder ($PP_FX_CACHE, else $XDG_CACHE_HOME/pp_fx or ~/.cache/pp_fx).

    Raises:
        ExportError: no compiler, or it fails.
        InputError: `compiler` is not there.
    """
    try:
        return LIBRARY.build(compiler=compiler, flags=flags)
    except BuildError as error:
        raise ExportError(f"{error}; the exported files run without the library, too, as they are") from error


def find_ort_ops() -> Path | None:
    """The library that `build_ort_ops` has built from the present sources, or None."""
    return LIBRARY.find()


def check_library(path: str | Path) -> None:
    """Raises:

    ExportError: the file is no operator library of ours, or one of another version.
    """
    try:
        LIBRARY.check(path)
    except BuildError as error:
        raise ExportError(f"ops_library={str(path)!r}: {error}; run pp-fx build-ort-ops") from error
