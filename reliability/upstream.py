"""transformers' own tests on transformed models, at ratio 0 and pruned.

python reliability/upstream.py FOLDER [--models llama opt]

FOLDER holds the tests of the installed version of transformers, which are not part of this project: `tests/`,
`utils/`, `conftest.py` and `pyproject.toml` of its repository, and `src/transformers`, a link to the installed package.
They need parameterized, pytest-timeout, timeout_decorator and pytest-rerunfailures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

RESULTS = Path(__file__).parent / "results" / "upstream.json"
LEFT_OUT = (
    "flash_attn", "flash_attention", "_fa2_", "_fa3_", "_fa4_", "fsdp", "hsdp", "test_tp_", "executorch", "onnx_export",
    "deepspeed", "IntegrationTest", "any_to_any", "_audio_", "_image_", "_video_", "vision", "speech",
)  # fmt: skip
"""Parts of the names of tests that need other hardware, a network or other kinds of models."""


def run(folder: Path, mode: str, models: list[str]) -> dict[str, Any]:
    """One record for each test, by its name."""
    with tempfile.TemporaryDirectory() as out:
        report = Path(out, "report.json")
        tests = [f"tests/models/{model}/test_modeling_{model}.py" for model in models]
        environment = {**os.environ, "PP_FX_MODE": mode, "PP_FX_REPORT": str(report), "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "upstream_plugin"]
        command += ["--timeout=300", "-k", " and ".join(f"not {name}" for name in LEFT_OUT), *tests]
        with Console(stderr=True).status(f"{mode}: {', '.join(models)}"):
            subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        return json.loads(report.read_text())


def compare(stock: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of the tests that pass on stock models and transform one: how many pass, are refused by name, or differ."""
    used = {n: r for n, r in other.items() if r.get("transforms") and stock.get(n, {}).get("outcome") == "passed"}
    failed = {n: r for n, r in used.items() if r.get("outcome") != "passed"}
    refused = {n: r["refused"][0] for n, r in failed.items() if r.get("refused")}
    differ = {n: r.get("errors", ["?"])[0].splitlines()[0] for n, r in failed.items() if n not in refused}
    return {"run": len(used), "passed": len(used) - len(failed), "refused": refused, "differ": differ}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="*", default=["llama", "opt", "gemma2", "qwen2"])
    options = parser.parse_args()
    stock = run(options.folder, "off", options.models)
    found = {mode: compare(stock, run(options.folder, mode, options.models)) for mode in ("zero", "pruned")}
    result = {"transformers": transformers.__version__, "models": options.models, "stock": len(stock), **found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console().print({mode: {k: v if isinstance(v, int) else len(v) for k, v in found[mode].items()} for mode in found})


if __name__ == "__main__":
    main()
