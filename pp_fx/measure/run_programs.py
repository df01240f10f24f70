"""Runs Python programs that a model has written, each in a process of its own, under limits.

The limits keep a wrong program from taking the machine's memory, time or disk, and hinder it from starting processes
and deleting files. They are no sandbox: a program can read what this user can read, write where this user can write,
and use the network.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..checks import check_integers
from ..errors import InputError
from ..progress import track

_WORKER = Path(__file__).with_name("program_worker.py")
_PYTHON = ("-s", "-S", "-P", str(_WORKER))
"""-I, but for its -E: the environment is ours, and its PYTHONHASHSEED makes the order of a set the same in every run.
-S: the standard library alone, so that results do not depend on what is installed."""
_TOKEN = 32
"""Characters that a worker reports."""


def run_programs(
    programs: Sequence[str],
    *,
    cpu_seconds: int = 5,
    wall_seconds: int = 20,
    memory: int = 1024,
    file: int = 16,
    workers: int = 1,
    progress: str | None = None,
) -> list[bool]:
    """Which programs run to their last line.

    Each runs in a new folder, which is deleted with what it wrote there, without input, output or environment, and with
    the standard library alone. An exception, an early exit (of any exit code) and a limit all count as not run.

    Args:
        programs: Python sources.
        cpu_seconds: processor time of a program; this, not the wall time, ends a loop, so that a busy machine gives
            the same results.
        wall_seconds: after so long a program that sleeps or waits is killed, with what it has started.
        memory: MiB of address space.
        file: MiB of the largest file that it may write.
        workers: programs at a time.
        progress: label of a progress bar on stderr, or None.

    Returns:
        One boolean for each program.

    Raises:
        InputError: a number is out of range, or this platform cannot run programs under limits.
    """
    check_integers(1, cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory=memory, file=file, workers=workers)
    require_limits()
    limits = (cpu_seconds, memory, file)
    if not _run("", wall_seconds, limits):  # else every program would count as wrong
        raise InputError(
            f"an empty program does not run under memory={memory}, cpu_seconds={cpu_seconds} and "
            f"wall_seconds={wall_seconds} with {sys.executable}; give more, or a machine where these limits can be set"
        )
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(lambda source: _run(source, wall_seconds, limits), programs)
        return [ended for _, ended in zip(track(programs, progress or "", progress is not None), done, strict=True)]


def require_limits() -> None:
    """Ask before the long work, not after it.

    Raises:
        InputError: this platform has no limits for processes.
    """
    if importlib.util.find_spec("resource") is None:
        raise InputError(
            f"sys.platform={sys.platform!r} has no limits for processes (Python's module resource), and programs of a "
            "model are not run without; use Linux, WSL or macOS"
        )


def _run(source: str, wall_seconds: float, limits: tuple[int, ...]) -> bool:
    token = secrets.token_hex(_TOKEN // 2)
    with tempfile.TemporaryDirectory(prefix="pp_fx_", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "program.py").write_text(source, encoding="utf-8", errors="replace")
        worker = subprocess.Popen(
            [sys.executable, *_PYTHON, token, *map(str, limits)],
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert worker.stdout is not None
        try:
            return _reported(worker.stdout.fileno(), wall_seconds) == token.encode()
        finally:
            # its process is not waited for yet, so that no other group can have this number
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            worker.stdout.close()


def _reported(pipe: int, seconds: float) -> bytes:
    """The first bytes, as many as a token has, that a worker writes; fewer where it ends before or the time is over."""
    end, found = time.monotonic() + seconds, b""
    while len(found) < _TOKEN and select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(pipe, _TOKEN - len(found))
        if not part:
            break
        found += part
    return found


def _environment(folder: str) -> dict[str, str]:
    """Where a Python may find its own library, and nothing about this user."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0", **kept}
