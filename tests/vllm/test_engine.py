"""Whole engines against transformers at the same settings, and against vLLM itself."""

import dataclasses

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM; `make vllm` makes an environment with it")

import pp_fx

from .conftest import IDS, SETTINGS, calibrated, engine, expected, generate, logprobs, steps_of, tokens


@pytest.mark.parametrize("compiled", [False, True])
def test_ratio_zero_is_vllm(dense_folder, compiled):
    with engine(dense_folder, enforce_eager=not compiled) as llm:
        dense = tokens(generate(llm, IDS))
    with engine(dense_folder, pruning={"mlp_ratio": 0.0}, enforce_eager=not compiled) as llm:
        assert tokens(generate(llm, IDS)) == dense


@pytest.mark.parametrize("compiled", [False, True])
def test_a_saved_folder_is_served_as_transformers_runs_it(pruned_folder, compiled):
    """One request at a time: probe, history, compensation and what the history learns are the same."""
    wanted, made = expected(calibrated(), IDS[:6], 8)
    with torch.no_grad():
        dense = pp_fx.restore(calibrated())(IDS[:6]).logits[:, :-1].log_softmax(-1)
    dense = dense.gather(2, IDS[:6, 1:, None])[..., 0]
    with engine(pruned_folder, enforce_eager=not compiled) as llm:
        assert llm.llm_engine.vllm_config.quant_config.settings.mlp_ratio == SETTINGS.mlp_ratio
        outputs = [generate(llm, IDS[i : i + 1], prompt_logprobs=0)[0] for i in range(6)]
        counts = steps_of(llm)
    assert (counts.steps, counts.pruned, counts.pruned_tokens) == (6 * 8, 6, IDS[:6].numel())
    assert (wanted - dense).abs().mean() > 0.05  # pruning is there to be seen
    torch.testing.assert_close(logprobs(outputs), wanted, atol=2e-3, rtol=0)
    assert tokens(outputs) == made


def test_a_dense_folder_is_pruned_on_its_way_in(dense_folder):
    model = pp_fx.transform(pp_fx.restore(calibrated()), SETTINGS)
    wanted, made = expected(model, IDS[:2], 4)
    with engine(dense_folder, pruning=SETTINGS.to_dict()) as llm:
        outputs = [generate(llm, IDS[i : i + 1], 4, prompt_logprobs=0)[0] for i in range(2)]
    torch.testing.assert_close(logprobs(outputs), wanted, atol=2e-3, rtol=0)
    assert tokens(outputs) == made


def test_settings_apart_from_config_json(tmp_path):
    model = calibrated()
    model.save_pretrained(tmp_path, quantization_config=False)
    with engine(str(tmp_path), quantization="pp_fx") as llm:
        assert llm.llm_engine.vllm_config.quant_config.settings == SETTINGS.on("cpu")
        outputs = generate(llm, IDS[:1], 4, prompt_logprobs=0)
    wanted, _ = expected(model, IDS[:1], 4)
    torch.testing.assert_close(logprobs(outputs), wanted, atol=2e-3, rtol=0)


def test_frozen_requests_do_not_depend_on_their_company(tmp_path):
    """Chunked prefill, lengths below `min_select_tokens`, decoding beside prompts: all of it in one engine."""
    calibrated(dataclasses.replace(SETTINGS, freeze_history=True)).save_pretrained(tmp_path)
    lengths = torch.randint(4, 96, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    rows = [row[:n] for row, n in zip(IDS.tolist(), lengths, strict=False)]
    with engine(str(tmp_path), max_num_batched_tokens=256) as llm:
        alone = [tokens(generate(llm, [row]))[0] for row in rows]
        before = steps_of(llm).pruned_tokens
        assert tokens(generate(llm, rows)) == alone
        assert tokens(generate(llm, rows[::-1])) == alone[::-1]
        assert steps_of(llm).pruned_tokens - before == 2 * sum(lengths)


def test_small_steps_run_dense(dense_folder, pruned_folder):
    rows = IDS[:4, : SETTINGS.min_select_tokens - 1].tolist()
    with engine(dense_folder) as llm:
        dense = [tokens(generate(llm, [row]))[0] for row in rows]
    with engine(pruned_folder) as llm:
        assert [tokens(generate(llm, [row]))[0] for row in rows] == dense
        assert steps_of(llm).pruned == 0


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_requests_in_random_company(pruned_folder, prefix_caching):
    """Every request ends, with as many tokens as it asked for, in mixed steps; the engine's memory holds still."""
    draw = torch.Generator().manual_seed(7)
    with engine(pruned_folder, max_num_batched_tokens=300, enable_prefix_caching=prefix_caching) as llm:
        sizes = []
        for _ in range(3):
            order = torch.randperm(64, generator=draw)
            rows = [IDS[i, : int(torch.randint(2, 97, (), generator=draw))].tolist() for i in order]
            assert [len(made) for made in tokens(generate(llm, rows))] == [8] * 64
            mlps = llm.llm_engine.vllm_config.quant_config.mlps.values()
            sizes.append(sum(b.numel() for mlp in mlps for b in mlp.state.buffers()))
        counts = steps_of(llm)
    assert len(set(sizes)) == 1
    assert 0 < counts.pruned < counts.steps
    assert 0 < counts.pruned_tokens < counts.tokens
