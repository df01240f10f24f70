"""Libraries of C++ kernels, compiled once on the machine that runs them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ._version import __version__
from .errors import BuildError, InputError

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")
NATIVE = ("-march=native",)
_COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class NativeLibrary:
    """One library: its sources, and the file in the user's cache folder that is built of them.

    It exports a function `<name>_version`, so that a file of another version is known.

    Attributes:
        name: of the file (`lib<name>-<digest>.so`).
        main: the source file that is compiled.
        include: a folder with headers of another library that `main` reads, or None.
    """

    name: str
    main: Path
    include: Path | None = None

    @property
    def path(self) -> Path:
        """Named after everything that it depends on: other sources or another processor build another one."""
        digest = hashlib.sha256(f"{__version__} {_processor()}".encode())
        for folder in (self.main.parent, self.include):
            for source in sorted(folder.iterdir()) if folder is not None else ():
                digest.update(source.read_bytes())
        suffix = "dylib" if sys.platform == "darwin" else "so"
        return _cache() / f"lib{self.name}-{digest.hexdigest()[:16]}.{suffix}"

    def find(self) -> Path | None:
        """The library, if it was built from the present sources for this processor."""
        return found if (found := self.path).is_file() else None

    def build(self, *, compiler: str | None = None, flags: tuple[str, ...] = NATIVE) -> Path:
        """Compile it.

        Args:
            compiler: GCC 12 or Clang 15 or later, by name or path; by default $CXX or the first one found.
            flags: more compiler flags.

        Returns:
            The library, in $PP_FX_CACHE, else $XDG_CACHE_HOME/pp_fx or ~/.cache/pp_fx.

        Raises:
            BuildError: no compiler, or it fails.
            InputError: `compiler` is not there.
        """
        chosen, library = _compiler(compiler), self.path
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder, library.name)
            command = [chosen, *self.arguments, *flags, str(self.main), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BuildError(f"{chosen} cannot build {self.name}: {done.stderr.strip()[-2000:]}")
            self.check(made)
            made.replace(library)
        return library

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of the compiler, without the processor's."""
        headers = () if self.include is None else (f"-I{self.include}",)
        return (*FLAGS, *headers, f'-DPP_FX_VERSION="{__version__}"')

    def check(self, path: str | Path) -> None:
        """Raises:

        BuildError: the file is no such library, or one of another version.
        """
        try:
            version = getattr(ctypes.CDLL(str(Path(path).resolve())), f"{self.name}_version")
        except (OSError, AttributeError) as error:
            raise BuildError(f"{str(path)!r} is no library of pp_fx operators ({error})") from None
        version.restype = ctypes.c_char_p
        if (found := version().decode()) != __version__:
            raise BuildError(f"{str(path)!r} was built by pp_fx {found}, this is {__version__}")


def _compiler(asked: str | None) -> str:
    if asked is not None:
        if shutil.which(asked) is None:
            raise InputError(f"compiler={asked!r} was not found; give the name or path of g++ or clang++")
        return asked
    for name in (os.environ.get("CXX"), *_COMPILERS):
        if name and shutil.which(name):
            return name
    raise BuildError("no C++ compiler was found; install g++ or clang++")


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
