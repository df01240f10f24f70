"""Every Python block of the site runs, each page from top to bottom; links and names in it exist."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pp_fx

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```python" in page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page):
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith(":::")}
    assert set(pp_fx.__all__) - {"errors", "export"} <= named


@pytest.mark.slow
def test_the_site_builds_without_a_warning():
    """`make docs`."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    subprocess.run(["make", "docs"], cwd=DOCS.parent, check=True, timeout=600)


def test_the_commands_of_the_pages_exist():
    from pp_fx.cli import app

    commands = {c.name for c in app.registered_commands}
    for page in DOCS.glob("*.md"):
        for name in re.findall(r"(?:^|`)pp-fx ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert name in commands, f"{page.name}: pp-fx {name}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", "docs/architecture.md", "docs/reliability.md"])
def test_the_files_that_a_page_names_exist(page):
    text = (DOCS.parent / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:pp_fx|passes|export|tests|docs|benchmarks|reliability|examples)/[\w./-]*)`", text)
    assert named or page == "README.md"
    for path in named:
        assert (DOCS.parent / path).exists(), path
