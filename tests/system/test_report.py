"""report(): one self-contained page with figures of the run; in a real browser nothing is missing."""

import json
import re
import shutil
import subprocess

import pytest
import torch

import pp_fx
from pp_fx.errors import InputError, StateError
from pp_fx.measure.report_figures import overlap
from tests.helpers.command import run
from tests.helpers.models import tiny_llama

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = tiny_llama(layers=5)
    ids = torch.randint(2, 97, (6, 40), generator=torch.Generator().manual_seed(0))
    where = tmp_path_factory.mktemp("report")
    page = pp_fx.report(
        model, ids, ids.flip(1), where, methods=("default", "flap"), ratios=(0.2, 0.3), batch=2, time_batch=2,
        repeats=1, title="A <tiny> model", progress=False,
    )  # fmt: skip
    assert not pp_fx.is_transformed(model)
    return page


def test_the_page_holds_everything_and_loads_nothing(made):
    text = made.read_text()
    assert text.count("data:image/png;base64,") == 5
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "A &lt;tiny&gt; model" in text
    assert text.count("<tr>") == 5, "a head and four rows"
    pictures = {p.name for p in made.parent.iterdir()} - {"report.html", "report.json"}
    assert pictures == {"quality.png", "kept.png", "stability.png", "macs.png", "shares.png"}


def test_the_figures_are_those_of_the_run(made):
    found = json.loads((made.parent / "report.json").read_text())
    assert len(found["kept"]) == 3
    assert len(found["comparison"]["rows"]) == 4
    shared = overlap(found)
    assert set(shared) == {f"{i}.mlp" for i in (2, 3, 4)}
    a, b, c = (set(kept["3.mlp"]) for kept in found["kept"])
    assert shared["3.mlp"] == pytest.approx((len(a & b) + len(a & c) + len(b & c)) / 3 / len(a))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(made, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dump = subprocess.run([*command, "--dump-dom", made.as_uri()], capture_output=True, text=True, timeout=120)
    assert dump.stdout.count("<img") == 5
    shot = tmp_path / "page.png"
    subprocess.run(
        [*command, f"--screenshot={shot}", "--window-size=1000,1600", made.as_uri()], capture_output=True, timeout=120
    )
    assert shot.stat().st_size > 50_000


def test_bad_input(tmp_path):
    model, ids = tiny_llama(layers=5), torch.randint(2, 97, (3, 20))
    with pytest.raises(InputError, match="ids holds 3 sequences, batch=2; give at least 4"):
        pp_fx.report(model, ids, ids, tmp_path, batch=2)
    pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.2))
    with pytest.raises(StateError, match="model is transformed"):
        pp_fx.report(model, ids, ids, tmp_path, batch=1)
    assert list(tmp_path.iterdir()) == []


def test_the_command(folder, tmp_path):
    done = run("report", folder, str(tmp_path / "out"), "--sequences", "4", "--length", "32", "--batch", "2",
               "--methods", "default", "--ratios", "0.2", "--dtype", "float32")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "report.html").is_file()
