"""Two ranks, each with its own channels, against one process in which each half of the channels selects for itself."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM; `make vllm` makes an environment with it")

from pp_fx.runtime.select import history_scores
from pp_fx.runtime.state import states_of

from .conftest import IDS, SETTINGS, calibrated, tiny

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, skip_tokenizer_init=True,
              tensor_parallel_size=2)
    how = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    for row in json.loads(sys.argv[2]):
        found = llm.generate([{"prompt_token_ids": row}], how, use_tqdm=False)[0]
        pairs = zip(found.prompt_logprobs[1:], row[1:])
        print("SUM", sum(one[token].logprob for one, token in pairs))
"""


def test_two_ranks(tmp_path):
    model = calibrated(dataclasses.replace(SETTINGS, freeze_history=True, mlp_compensation=None))
    model.save_pretrained(tmp_path)
    dense = tiny()
    states = [state for state in states_of(model) if state.prunes]
    for layer, state in zip(dense.model.layers[1:], states, strict=True):
        halves = history_scores(state).view(2, 96)  # 96 * 0.4 = 38.4 channels, rounded up to a multiple of 16
        kept = halves.topk(48).indices + torch.tensor([[0], [96]])
        mask = torch.zeros(192).index_fill(0, kept.flatten(), 1)
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given, mask=mask: (given[0] * mask,))
    ids = IDS[:3]
    with torch.no_grad():
        logprobs = dense(ids).logits[:, :-1].log_softmax(-1)
    wanted = logprobs.gather(2, ids[:, 1:, None]).sum((1, 2))
    program = Path(tmp_path, "program.py")
    program.write_text(PROGRAM)
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, str(program), str(tmp_path), json.dumps(ids.tolist())]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300)
    sums = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("SUM")]
    assert len(sums) == 3, done.stderr[-2000:]
    torch.testing.assert_close(torch.tensor(sums), wanted, atol=0.02, rtol=0)
