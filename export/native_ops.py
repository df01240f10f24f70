"""The native kernels of the `pp_fx` operators: building the library, and finding the one that was built."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .._version import __version__
from ..errors import ExportError, InputError

SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")
_COMPILERS = ("c++", "g++", "clang++")


def build_ort_ops(*, compiler: str | None = None, flags: tuple[str, ...] = ("-march=native",)) -> Path:
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
    chosen = _compiler(compiler)
    library = _library()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, library.name)
        define = f'-DPP_FX_VERSION="{__version__}"'
        command = [chosen, *_FLAGS, *flags, define, str(SOURCES / "ops.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ExportError(f"{chosen} cannot build the operator library: {done.stderr.strip()[-2000:]}")
        check_library(made)
        made.replace(library)
    return library


def find_ort_ops() -> Path | None:
    """The library that `build_ort_ops` has built from the present sources, or None."""
    return found if (found := _library()).is_file() else None


def check_library(path: str | Path) -> None:
    """Raises:

    ExportError: the file is no operator library of ours, or one of another version.
    """
    try:
        version = ctypes.CDLL(str(Path(path).resolve())).pp_fx_ops_version
    except (OSError, AttributeError) as error:
        raise ExportError(f"ops_library={str(path)!r} is no library of pp_fx operators ({error})") from None
    version.restype = ctypes.c_char_p
    if (found := version().decode()) != __version__:
        raise ExportError(
            f"ops_library={str(path)!r} was built by pp_fx {found}, this is {__version__}; run pp-fx build-ort-ops"
        )


def _compiler(asked: str | None) -> str:
    if asked is not None:
        if shutil.which(asked) is None:
            raise InputError(f"compiler={asked!r} was not found; give the name or path of g++ or clang++")
        return asked
    for name in (os.environ.get("CXX"), *_COMPILERS):
        if name and shutil.which(name):
            return name
    raise ExportError("no C++ compiler was found; install g++ or clang++, or go on without: the files run as they are")


def _library() -> Path:
    """Named after everything that it depends on: a change builds another one."""
    digest = hashlib.sha256(f"{__version__} {_processor()}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return _cache() / f"libpp_fx_ops-{digest.hexdigest()[:16]}.{suffix}"


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines that cannot run each other's code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    known = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()} {known}"


def _cache() -> Path:
    if own := os.environ.get("PP_FX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pp_fx")
