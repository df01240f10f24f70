"""Tokens that decode: whole engines against transformers at the same settings."""

import dataclasses

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM; `make vllm` makes an environment with it")

import pp_fx
from pp_fx.runtime.selections import selections_on
from tests.helpers.continuous import serve

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


ROLLING = dataclasses.replace(SETTINGS, decode="rolling", reprobe_every=5, mlp_compensation="mean")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.7])
def test_a_rolling_selection_is_transformers(tmp_path, compiled, threshold):
    """One request after another in one engine: the same prompts, the same windows, the same choices."""
    settings = dataclasses.replace(ROLLING, drift_threshold=threshold)
    model = pp_fx.transform(tiny(), settings)
    model.save_pretrained(tmp_path)
    wanted = [(row, 9) for row in IDS[:4].tolist()]
    made = serve(model, wanted, together=False)
    with engine(str(tmp_path), enforce_eager=not compiled) as llm:
        outputs = [generate(llm, [row], count)[0] for row, count in wanted]
        held = [s.kept for s in selections_on(steps_of(llm)).all()]
    assert tokens(outputs) == [found for found, _ in made]
    assert len(held) == 2
    still = dataclasses.replace(ROLLING, reprobe_every=1000)
    assert made != serve(pp_fx.transform(tiny(), still), wanted, together=False)


def test_a_frozen_history_decodes_independently(tmp_path):
    calibrated(dataclasses.replace(ROLLING, freeze_history=True)).save_pretrained(tmp_path)
    rows = [row[:n] for row, n in zip(IDS.tolist(), range(2, 90, 4), strict=False)]
    with engine(str(tmp_path), max_num_batched_tokens=256) as llm:
        alone = [tokens(generate(llm, [row]))[0] for row in rows]
        assert tokens(generate(llm, rows)) == alone
        assert selections_on(steps_of(llm)) is None  # the compact weights of prompts serve them, too
    model = calibrated(dataclasses.replace(ROLLING, freeze_history=True))
    assert alone == [found for found, _ in serve(model, [(row, 8) for row in rows], together=False)]


def test_the_memory_of_a_rolling_selection_holds_still(pruned_folder):
    pruning = dataclasses.replace(ROLLING, compact_megabytes=0.15).to_dict()
    with engine(pruned_folder, pruning=pruning, max_num_batched_tokens=300) as llm:
        places = []
        for _ in range(2):
            assert [len(made) for made in tokens(generate(llm, IDS[:32, :40]))] == [8] * 32
            held = [*selections_on(steps_of(llm)).all()]
            places.append([selection.kept.data_ptr() for selection in held])
        assert places[0] == places[1]
        assert [selection.compacts for selection in held] == [True, False]
