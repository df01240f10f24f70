"""Run the core tests with other versions of what pp_fx stands on.

    python reliability/versions.py

A job lays other versions over the present environment (`pip install --target`), or makes an environment of
its own with another Python. A job that cannot be installed here is "not run", with the reason. Another torch is several
gigabytes without a CPU build in most package indexes: those jobs have a Python of their own, run what depends on torch
(with a family for every way to find the channels) and are left out without --torch. `--python` takes an environment
that is there already:

    python reliability/versions.py --only "torch 2.12.1" --python ../torch-2.12/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "versions.json"
TESTS = (
    "behaviour/test_transform", "behaviour/test_bypassed", "behaviour/test_cache", "behaviour/test_reference",
    "families/test_families", "system/test_saving", "system/test_export",
)  # fmt: skip
TORCH_TESTS = (
    "behaviour/test_compile", "behaviour/test_cuda_graphs", "behaviour/test_transform", "behaviour/test_kernels",
    "behaviour/test_cache", "behaviour/test_decode", "behaviour/test_generate", "behaviour/test_compact",
    "families/test_families", "system/test_export",
)  # fmt: skip
FAMILIES = "not test_families or Llama or Phi3 or OPT or GPT-2 or Gemma2 or GPT-NeoX or Mixtral"
OVERLAID = ("torch", "transformers", "onnxruntime")


@dataclass(frozen=True)
class Job:
    """Versions that differ from constraints.txt; `python` "" is the present one."""

    python: str = ""
    pins: dict[str, str] = field(default_factory=dict)


JOBS = (
    Job(pins={"transformers": "5.17.0"}),
    Job(pins={"transformers": "5.24.0"}),
    Job(pins={"onnxruntime": "1.30.0"}),
    Job(python="3.12", pins={"torch": "2.11.0", "transformers": "5.17.0"}),
    Job(python="3.12", pins={"torch": "2.12.1", "transformers": "5.24.0"}),
    Job(python="3.12", pins={"torch": "2.14.1", "transformers": "5.24.0"}),
    Job(python="3.12", pins={"torch": "2.15.0", "transformers": "5.24.0"}),
)


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **options)


def interpreter(version: str, pins: dict[str, str], folder: Path) -> str:
    """Python of a new environment in which the project is installed, with these versions."""
    found = shutil.which(f"python{version}")
    if found is None or run([found, "--version"]).returncode:
        raise LookupError(f"there is no python{version} here")
    made = run([found, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    constraints = folder.with_name("constraints.txt")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    free = {*pins, "triton", "tokenizers"}  # the last two go with torch and transformers
    kept = [line for line in lines if line.partition("==")[0] not in free]
    constraints.write_text("\n".join([*kept, *(f"{k}=={v}" for k, v in pins.items())]), encoding="utf-8")
    for arguments in (["torch"], ["-e", ".[dev]"]):
        if made.returncode == 0:
            made = run([python, "-m", "pip", "install", "-q", "-c", str(constraints), *arguments], cwd=ROOT)
    if made.returncode:
        raise LookupError(f"cannot be installed here ({_last(made)})")
    return python


def overlay(pins: dict[str, str], folder: Path) -> None:
    """The pinned packages and what they need, in a folder for PYTHONPATH."""
    wanted = [f"{name}=={version}" for name, version in pins.items()]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = folder.with_name("constraints.txt")
    constraints.write_text("\n".join(line for line in lines if line.partition("==")[0] not in pins), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), "-c", str(constraints), *wanted]
    made = run(command)
    if made.returncode:
        raise LookupError(f"cannot be installed here ({_last(made)})")


def versions(python: str, environment: dict[str, str]) -> dict[str, str]:
    """What the job really imports."""
    lines = "; ".join(f"print({name!r}, {name}.__version__)" for name in OVERLAID)
    code = f"import sys, {', '.join(OVERLAID)}; print('python', sys.version.split()[0]); {lines}"
    out = run([python, "-c", code], env=environment).stdout
    return dict(line.split() for line in out.splitlines() if len(line.split()) == 2)


def perform(job: Job, present: str | None) -> dict[str, Any]:
    """Install (unless an environment is `present`), test, and say how many tests passed and failed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            made = present or (interpreter(job.python, job.pins, folder / "venv") if job.python else None)
            python = made or sys.executable
            if job.pins and not made:
                overlay(job.pins, folder / "over")
                environment["PYTHONPATH"] = str(folder / "over")
        except LookupError as reason:
            return {"asked": _asked(job), "result": "not run", "reason": str(reason)}
        files = [f"tests/{name}.py" for name in (TORCH_TESTS if "torch" in job.pins else TESTS)]
        chosen = ["-k", FAMILIES] if "torch" in job.pins else []
        command = [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *chosen, *files]
        done = run(command, cwd=ROOT, env=environment)
        used = versions(python, environment)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    result = "passed" if done.returncode == 0 else "FAILED"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    seconds = round(time.monotonic() - start)
    return {"asked": _asked(job), "result": result, **counts, "failures": failed, "versions": used, "seconds": seconds}


def again(found: dict[str, Any], python: str) -> dict[str, Any]:
    """A result after what failed in it has run again (the code was mended since); what passed stays as it was."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *found["failures"]]
    done = run(command, cwd=ROOT, env=environment)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    passed = found["passed"] + len(found["failures"]) - len(failed)
    counts = {"passed": passed, "failed": len(failed), "failures": failed, "mended": found["failures"]}
    return {**found, **counts, "result": "FAILED" if done.returncode else "passed"}


def _asked(job: Job) -> str:
    parts = [f"Python {job.python}"] * bool(job.python) + [f"{k} {v}" for k, v in job.pins.items()]
    return ", ".join(parts) or "constraints.txt"


def _last(done: subprocess.CompletedProcess) -> str:
    lines = [x for x in (done.stderr or done.stdout).strip().splitlines() if "for help visit" not in x]
    return lines[-1][:200] if lines else f"exit status {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", action="store_true", help="also the jobs that download another torch")
    parser.add_argument("--only", default="", help="only jobs with this in their name; the others' results stay")
    parser.add_argument("--python", help="of an environment that holds the versions of the job named by --only")
    parser.add_argument("--failed", action="store_true", help="with --python: run again what failed, now mended")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
    results = {result["asked"]: result for result in known}
    for job in JOBS:
        name = _asked(job)
        if options.only not in name:
            continue
        if options.failed and options.python:
            results[name] = again(results[name], options.python)
        elif "torch" in job.pins and not options.torch and not options.python:
            results[name] = {"asked": name, "result": "not run", "reason": "needs --torch (a large download)"}
        else:
            results[name] = perform(job, options.python)
        Console().print(results[name])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        ordered = [results[_asked(job)] for job in JOBS if _asked(job) in results]
        options.out.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
