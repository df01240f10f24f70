"""Tensor parallel models of transformers on gloo; what every rank checks is in tests/helpers/tensor_parallel.py."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import pp_fx
from pp_fx.calibration.history_file import HISTORY_FILE

from .test_distributed import torchrun

SLOW = [("Qwen2", 2), ("GPT-NeoX", 2), ("OPT", 2), ("Qwen3", 2), ("Gemma2", 2), ("Phi", 2)]
"""Families and numbers of processes. transformers has no plan for OPT: the test gives one for its MLP."""


@pytest.mark.parametrize(
    ("names", "processes"),
    [
        (("Llama", "errors", "saved", "refusals"), 2),
        *(pytest.param((name,), count, marks=pytest.mark.slow) for name, count in SLOW),
        pytest.param(("GPT-NeoX", "Llama", "errors", "saved", "refusals"), 4, marks=pytest.mark.slow),
        pytest.param(("Llama", "compiled"), 2, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_shards(names, processes, tmp_path):
    torchrun("-m", "tests.helpers.tensor_parallel", tmp_path, *names, processes=processes)
    assert {(tmp_path / f"done-{rank}").read_text() for rank in range(processes)} == {" ".join(names)}


@pytest.mark.slow
def test_the_page_s_script_runs(dense_folder, tmp_path):
    page = Path(__file__).parents[2] / "docs" / "tensor-parallel.md"
    script = tmp_path / "tensor_parallel.py"
    script.write_text(
        page.read_text(encoding="utf-8").split("```py\n")[1].split("```")[0].replace('"pruned"', "sys.argv[2]")
    )
    torchrun(script, dense_folder, tmp_path / "pruned")
    assert (tmp_path / "pruned" / HISTORY_FILE).exists()
    assert pp_fx.is_transformed(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"))
