"""Model classes that no family stands for: right at ratio 0, or refused by name (`reliability/model_classes.py`)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "reliability" / "model_classes.py"
_spec = importlib.util.spec_from_file_location("model_classes", SCRIPT)
sweep = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sweep)


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("image-text", "gemma3", "right"),  # initial values that are looked at
        ("image-text", "llava", "right"),  # no causal language model by its configuration
        ("causal", "lfm2", "right"),  # masks that depend on numbers
        ("causal", "xglm", "right"),  # reads how many keys there are
        ("causal", "minicpm3", "right"),  # writes into views
        ("causal", "jetmoe", "right"),  # sizes that depend on the data
        ("causal", "minimax", "refused"),  # a cache of its own
        ("causal", "mamba", "refused"),  # no attention
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_right_or_refused(kind, name, expected):
    found = sweep.judge(kind, name, export=False)
    assert found["result"] == expected, found


@pytest.mark.slow
def test_every_class(tmp_path):
    """All of them, in about five minutes."""
    subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "found.json"], check=True)
    found = json.loads((tmp_path / "found.json").read_text())["classes"]
    assert [name for name, row in found.items() if row["result"] == "STRAY"] == []
    assert sum(row["result"] == "right" for row in found.values()) > 100
