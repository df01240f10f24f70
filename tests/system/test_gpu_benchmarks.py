"""The scripts for machines with a GPU run on this one, with small shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_gpu_py_measures_every_side_and_writes_as_it_goes(tmp_path):
    out = tmp_path / "gpu"
    options = ("--device", "cpu", "--backend", "eager", "--tiny", "--out", out)
    shown = run("gpu.py", *options, "--repeats", 1)
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["left_out"] == [], shown
    assert [r["name"] for r in found["rows"]] == ["tiny prefill 2 x 64", "tiny decode 2 x 32, CUDA graphs"]
    prefill, decode = (r["sides"] for r in found["rows"])
    assert {
        "dense",
        "static",
        "no compensation",
        "mean",
        "least squares",
        "sticky",
        "MLP and heads",
        "by step",
        "by step, 50%",
    } == set(prefill)
    assert {"dense", "static", "sticky", "MLP and heads", "by step"} == set(decode)
    assert all(side["wall_ms"] > 0 for row in (prefill, decode) for side in row.values())
    assert [r["rows"] for r in found["products"]] == [1, 64]
    assert out.with_suffix(".profile.txt").read_text().startswith("tiny")
    assert " s: " not in run("gpu.py", *options, "--missing")  # nothing is


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX environment")
def test_gpu_py_runs_from_a_checkout_without_installation(tmp_path):
    """As on a machine that has torch, transformers and rich alone."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        f"sys.path[:0] = [{str(ROOT / 'benchmarks')!r}]; "
        "sys.path = [p for p in sys.path if p not in ('', '.')]; import checkout, pp_fx.passes, pp_fx.export; "
        "print(pp_fx.passes.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "passes" / "__init__.py"), done.stderr


def test_gpu_onnx_says_that_it_is_skipped():
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the provider: run benchmarks/gpu_onnx.py itself")
    assert "skipped: this onnxruntime has no CUDAExecutionProvider" in run("gpu_onnx.py")
