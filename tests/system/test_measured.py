"""The figures of the documentation are those of benchmarks/results."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PROSE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->|>= [\d.]+|arXiv [\d.]+", re.DOTALL)
"""What is no figure: code, addresses, comments, versions."""
DECIMAL = re.compile(r"(?<![\w.])(?<![A-Za-z]-)\d+\.\d+(?![\w.]*\d)")


@pytest.fixture(scope="module")
def measured():
    spec = importlib.util.spec_from_file_location("measured", ROOT / "docs" / "measured.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/measured.md"])
def test_the_tables_are_those_of_the_files(page, measured):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert measured.rendered(text) == text, "run: python docs/measured.py"


def test_every_file_has_its_table(measured):
    text = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"<!-- {file.stem} -->\n\n|" in text, file.name
    assert re.findall(r"<!-- ([\w-]+) -->", text) == re.findall(r"<!-- /([\w-]+) -->", text)
    assert "<!-- headline -->" in README.read_text(encoding="utf-8")


def test_a_wrong_figure_is_noticed(measured):
    text = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    ppl = json.loads((ROOT / "benchmarks/results/perplexity.json").read_text())["rows"][0]["in domain"]["ppl"]
    assert f"| {ppl:.1f} |" in text
    assert measured.rendered(text.replace(f"| {ppl:.1f} |", "| 12.3 |")) == text


def test_every_decimal_of_the_readme_is_in_the_documentation():
    prose = PROSE.sub(" ", README.read_text(encoding="utf-8"))
    pages = (ROOT / "docs" / name for name in ("measured.md", "limits.md", "how-it-works.md"))
    known = {number for page in pages for number in DECIMAL.findall(page.read_text(encoding="utf-8"))}
    assert set(DECIMAL.findall(prose)) - known == set()
