"""vLLM with and without pruning: perplexity of prompts beside transformers', and throughput, interleaved.

    make vllm && .venv-vllm/bin/python benchmarks/serving.py --text test.txt --calibration valid.txt

SmolLM2-135M-Instruct in bf16, one thread, eager. Perplexity: by `prompt_logprobs`, one request at a time (a step is one
sequence, as in transformers' batches of one) and up to four in a step. Throughput: all requests are given at once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import torch
import vllm
from report import bars, write_json
from vllm import LLM, SamplingParams

import pp_fx
from pp_fx.evaluate import evaluate
from pp_fx.macs import count_macs
from pp_fx.models import load
from pp_fx.text import read, sequences

SEQUENCES, LENGTH = 20, 512
LOADS = {"prompts alone": (16, 512, 1), "512 in, 128 out": (32, 512, 128)}
"""Requests, tokens of a prompt, tokens generated."""


def engine(folder: str, **options: Any) -> LLM:
    """vLLM on a folder, without its tokenizer."""
    return LLM(
        folder, dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, enable_prefix_caching=False,
        max_model_len=LENGTH + 128, max_num_batched_tokens=2048, seed=0, **options,
    )  # fmt: skip


def run(llm: LLM, ids: torch.Tensor, **sampling: Any) -> list[Any]:
    """Greedy outputs for the rows of ids [N, T]."""
    how = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **sampling)
    return llm.generate([{"prompt_token_ids": row} for row in ids.tolist()], how, use_tqdm=False)


def prompt_perplexity(llm: LLM, ids: torch.Tensor) -> float:
    """Of the tokens of all prompts but their first."""
    nll = []
    for output in run(llm, ids, max_tokens=1, prompt_logprobs=0):
        pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        nll += [-found[token].logprob for found, token in pairs]
    return torch.tensor(nll, dtype=torch.float64).mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load("smollm2", torch.bfloat16)
    ids = sequences(read(options.text), tokenizer, SEQUENCES, LENGTH)
    sample = sequences(read(options.calibration), tokenizer, 64, LENGTH)
    with tempfile.TemporaryDirectory() as base:
        rows: list[dict[str, Any]] = [{"label": "dense", "mlp_ratio": 0.0, "transformers": evaluate(model, ids, 1).ppl}]
        model.save_pretrained(f"{base}/0.0")
        for ratio in (0.1, 0.2, 0.4):
            pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=ratio))
            pp_fx.calibrate(model, sample, progress=False)
            model.save_pretrained(f"{base}/{ratio}")
            macs = count_macs(model, 1, LENGTH)
            row = {"label": f"MLP {ratio:.0%}", "mlp_ratio": ratio, "transformers": evaluate(model, ids, 1).ppl}
            rows.append({**row, "macs": (macs.pruned + macs.overhead) / macs.dense})
            pp_fx.restore(model)
        for row in rows:
            row["alone"] = prompt_perplexity(engine(f"{base}/{row['mlp_ratio']}", max_num_seqs=1), ids)
        engines = [engine(f"{base}/{row['mlp_ratio']}", max_num_seqs=32) for row in rows]
        for row, llm in zip(rows, engines, strict=True):
            row["in company"] = prompt_perplexity(llm, ids)
        print(rows, flush=True)
        seconds: dict[tuple[str, str], list[float]] = {}
        draw = torch.Generator().manual_seed(0)
        for _ in range(options.rounds):
            for load_name, (requests, length, generated) in LOADS.items():
                prompts = torch.randint(0, ids.numel() - length, (requests,), generator=draw)
                prompts = torch.stack([ids.flatten()[i : i + length] for i in prompts.tolist()])
                for row, llm in zip(rows, engines, strict=True):
                    start = time.perf_counter()
                    run(llm, prompts, max_tokens=generated)
                    seconds.setdefault((row["label"], load_name), []).append(time.perf_counter() - start)
            print(seconds, flush=True)
    for row in rows:
        for load_name, (requests, length, generated) in LOADS.items():
            own, dense = seconds[row["label"], load_name], seconds["dense", load_name]
            row[load_name] = {
                "seconds": own,
                "tokens_per_second": requests * (length + generated) / statistics.median(own),
                "ratio": statistics.median(a / b for a, b in zip(own, dense, strict=True)),
            }
    write_json(options.out, {"loads": LOADS, "rows": rows, "versions": {"vllm": vllm.__version__}})
    labels = [f"{row['label']}, perplexity {row['in company']:.1f}" for row in rows]
    series = {name: [row[name]["ratio"] for row in rows] for name in LOADS}
    bars(options.out.with_suffix(".png"), "SmolLM2 in vLLM", "time / dense", labels, series)


if __name__ == "__main__":
    main()
