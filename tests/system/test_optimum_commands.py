"""`optimum-cli export pp-onnx` is found by optimum and does what `pp-fx export` does."""

import subprocess
import sys
from pathlib import Path

import pytest

import pp_fx.cli

pytest.importorskip("optimum.commands.optimum_cli", reason="needs optimum")


def optimum(*arguments):
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "pp-onnx", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_errors_are_those_of_pp_fx_export(tmp_path):
    (tmp_path / "kept").write_text("mine")
    done = optimum("smollm2", tmp_path, "--mlp-ratio", "0.2")
    assert done.returncode == 1
    assert f"pp-fx:directory='{tmp_path}'isnotempty" in "".join(done.stderr.split())  # rich wraps lines anywhere


def test_arguments_are_handed_on(monkeypatch):
    from optimum.commands import optimum_cli

    given = []
    monkeypatch.setattr(pp_fx.cli, "main", given.append)
    arguments = ["MODEL", "DIR", "--attention-ratio", "0.3", "--opset", "24", "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "pp-onnx", *arguments])
    optimum_cli.main()
    assert given == [["export", *arguments]]
