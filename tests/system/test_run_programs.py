"""Programs under limits: what counts as run to the end, and what a program is kept from."""

import os
import time

import pytest

from pp_fx.errors import InputError
from pp_fx.measure.run_programs import run_programs


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("import copy, hashlib, math, random, re, string\nassert math.gcd(4, 6) == 2", True),
        ("print('x' * 10**6)\nimport sys\nsys.stderr.write('y' * 10**6)", True),
        ("import sys\nassert sys.stdin.read() == ''\nassert len(sys.argv) == 1", True),
        ("import os\nassert 'PP_FX_SECRET' not in os.environ", True),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    a: 'int' = 1\nassert A() == A(1)", True),
        ("assert False", False),
        ("def f(:", False),
        ("input()", False),
        ("\0", False),
        ("import numpy", False),
        ("raise SystemExit(0)", False),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("def f():\n    return f()\nf()", False),
        ("import os\nos.write(3, b'0' * 32)\nos.write(3, b'0' * 32)", False),
        ("import os\nos.closerange(3, 20)", False),
        ("import os\nos.fork()", False),
        ("import subprocess\nsubprocess.run(['true'])", False),
        ("import os\nos.remove('program.py')", False),
        ("x = bytearray(2**31)", False),
        ("open('large', 'wb').write(bytes(3 * 2**20))", False),
    ],
)  # fmt: skip
def test_what_counts_as_run(program, ended, monkeypatch):
    monkeypatch.setenv("PP_FX_SECRET", "1")
    assert run_programs([program], wall_seconds=10, file=2) == [ended]


@pytest.mark.parametrize(
    ("program", "limits"),
    [
        ("while True: pass", {"cpu_seconds": 1, "wall_seconds": 60}),
        ("import time\ntime.sleep(60)", {"wall_seconds": 1}),
        ("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)", {"wall_seconds": 1}),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nassert False", {}),
    ],
)
def test_none_is_waited_for_forever(program, limits):
    start = time.monotonic()
    assert run_programs([program], **limits) == [False]
    assert time.monotonic() - start < 15


def test_what_a_program_starts_ends_with_it(tmp_path):
    """Root may fork whatever the limit says, past the guard: then the whole group is killed."""
    told = tmp_path / "pid"
    program = (
        f"import posix, time\npid = posix.fork()\nif not pid: time.sleep(60)\nopen({str(told)!r}, 'w').write(str(pid))"
    )
    run_programs([program])
    if not told.exists():
        return  # the limit held
    for _ in range(100):
        if not _runs(int(told.read_text())):
            return
        time.sleep(0.05)
    pytest.fail("a child is left")


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_it_writes_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = tmp_path / "told"
    told.touch()
    program = f"import os\nopen('file', 'w').write('x')\nopen({str(told)!r}, 'w').write(os.getcwd())"
    assert run_programs([program]) == [True]
    assert os.listdir(tmp_path) == ["told"]
    assert not os.path.exists(told.read_text())


def test_the_order_of_a_set_is_the_same_in_every_run(tmp_path):
    told = [tmp_path / "a", tmp_path / "b"]
    programs = [f"open({str(t)!r}, 'w').write(str(set('pruning')))" for t in told]
    assert run_programs(programs, workers=2) == [True, True]
    assert told[0].read_text() == told[1].read_text()


def test_results_keep_the_order_of_the_programs():
    programs = ["import time\ntime.sleep(0.3)", "assert False", ""]
    assert run_programs(programs, workers=3, progress="programs") == [True, False, True]
    assert run_programs([]) == []


def test_limits_that_no_program_fits_into_are_an_error():
    with pytest.raises(InputError, match="memory=1, "):
        run_programs([""], memory=1)
    with pytest.raises(InputError, match="cpu_seconds=0"):
        run_programs([""], cpu_seconds=0)


def test_a_platform_without_limits_is_refused(monkeypatch):
    monkeypatch.setattr("pp_fx.measure.run_programs.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="has no limits for processes"):
        run_programs([""])
