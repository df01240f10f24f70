"""A thousand requests in random order and company (`-m "vllm and slow"`)."""

import dataclasses

import psutil
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM; `make vllm` makes an environment with it")

from .conftest import IDS, SETTINGS, calibrated, engine, generate, steps_of, tokens

ROUNDS, REQUESTS, NEW = 8, 125, 8
GROWTH = 16 * 2**20
"""Bytes that a process may grow by after its first rounds: a copy of weights at every step would be far more."""


def drawn(draw):
    """Prompts of 2 to 96 tokens, some of them twice."""
    lengths = torch.randint(2, 97, (REQUESTS,), generator=draw).tolist()
    rows = torch.randint(0, len(IDS), (REQUESTS,), generator=draw).tolist()
    return [IDS[row, :length].tolist() for row, length in zip(rows, lengths, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("decode", ["dense", "step", "rolling"])
def test_a_thousand_requests(tmp_path, decode, compiled):
    """All end with as many tokens as they asked for; memory and the number of compiled graphs hold still."""
    calibrated(dataclasses.replace(SETTINGS, decode=decode)).save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(11)
    options = {"max_num_batched_tokens": 300, "enforce_eager": not compiled}
    with engine(str(tmp_path), **options) as llm:
        sizes, graphs = [], []
        for _ in range(ROUNDS):
            assert [len(made) for made in tokens(generate(llm, drawn(draw), NEW))] == [NEW] * REQUESTS
            sizes.append(psutil.Process().memory_info().rss)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        counts = steps_of(llm)
        buffers = [b for mlp in llm.llm_engine.vllm_config.quant_config.mlps.values() for b in mlp.state.buffers()]
    assert sizes[-1] - sizes[2] < GROWTH
    assert len(set(graphs)) == 1
    assert 0 < counts.pruned < counts.steps
    assert all(bool(torch.isfinite(b).all()) for b in buffers if b.is_floating_point())


@pytest.mark.slow
def test_a_thousand_frozen_requests_do_not_depend_on_their_company(tmp_path):
    calibrated(dataclasses.replace(SETTINGS, freeze_history=True)).save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(12)
    rows = drawn(draw)
    with engine(str(tmp_path), max_num_batched_tokens=256) as llm:
        alone = [tokens(generate(llm, [row], NEW))[0] for row in rows]
        for _ in range(ROUNDS):
            order = torch.randperm(REQUESTS, generator=draw).tolist()
            assert tokens(generate(llm, [rows[i] for i in order], NEW)) == [alone[i] for i in order]
