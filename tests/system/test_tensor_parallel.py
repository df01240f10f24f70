"""Tensor parallel models of transformers on gloo; what every rank checks is in tests/helpers/tensor_parallel.py."""

import pytest

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
