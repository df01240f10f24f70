"""Tokens that decode: whole engines against transformers at the same settings."""

import dataclasses

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM; `make vllm` makes an environment with it")

import pp_fx

from .conftest import IDS, SETTINGS, calibrated, engine, expected, generate, logprobs, steps_of, tiny, tokens

STEP = dataclasses.replace(SETTINGS, decode="step", decode_ratio=0.5)


@pytest.mark.parametrize("compiled", [False, True])
def test_decoding_by_step_is_transformers(tmp_path, compiled):
    """One request at a time, prompts pruned."""
    model = calibrated(STEP)
    model.save_pretrained(tmp_path)
    wanted, made = expected(model, IDS[:4], 8)
    with engine(str(tmp_path), enforce_eager=not compiled) as llm:
        outputs = [generate(llm, IDS[i : i + 1], prompt_logprobs=0)[0] for i in range(4)]
    torch.testing.assert_close(logprobs(outputs), wanted, atol=2e-3, rtol=0)
    assert tokens(outputs) == made
    dense = expected(calibrated(), IDS[:4], 8)[1]
    assert dense != made


@pytest.mark.parametrize("compiled", [False, True])
def test_by_step_requests_do_not_depend_on_their_company(dense_folder, compiled):
    """Whole prompts in chunks, decoding beside them; more sequences than the kernels run, and fewer."""
    settings = dataclasses.replace(STEP, mlp_ratio=0.0)
    lengths = torch.randint(33, 96, (24,), generator=torch.Generator().manual_seed(5)).tolist()
    rows = [row[:n] for row, n in zip(IDS.tolist(), lengths, strict=False)]
    model = pp_fx.transform(tiny(), settings)
    made = [expected(model, torch.tensor([row]), 8)[1][0] for row in rows]
    options = {"max_num_batched_tokens": 256, "enforce_eager": not compiled}
    with engine(dense_folder, pruning=settings.to_dict(), **options) as llm:
        assert tokens(generate(llm, rows)) == made
        assert tokens(generate(llm, rows[::-1])) == made[::-1]
        assert steps_of(llm).steps > 0


def test_without_a_ratio_it_is_vllm(dense_folder):
    with engine(dense_folder) as llm:
        dense = tokens(generate(llm, IDS[:16]))
    pruning = {"mlp_ratio": 0.0, "decode": "step", "decode_ratio": 0.0}
    with engine(dense_folder, pruning=pruning) as llm:
        assert tokens(generate(llm, IDS[:16])) == dense
