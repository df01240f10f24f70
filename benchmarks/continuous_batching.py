"""transformers' generate_batch with and without pruning: processor time and throughput, interleaved.

    OMP_NUM_THREADS=1 python benchmarks/continuous_batching.py
    OMP_NUM_THREADS=1 python benchmarks/continuous_batching.py --decode dense,step,rolling

SmolLM2-135M-Instruct in bf16, one thread. Sixteen requests are given at once; the dense model is a stock one. No
history from calibration: the selections of the first steps are the probe's alone, which takes no other time. Processor
time of the whole process, so that other programs disturb little. `--decode`: decoding alone, by these values of
`decode`, at 40% of every layer's MLP: the time of 33 tokens less that of one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from report import bars, write_json
from transformers import ContinuousBatchingConfig, GenerationConfig

import pp_fx
from pp_fx.models import load
from pp_fx.text import PYTHON_DOCS, read, sequences

RATIOS = (0.0, 0.1, 0.2, 0.4)
LOADS = {"128 in, 1 out": (128, 1), "128 in, 32 out": (128, 32)}
"""Tokens of a prompt, tokens generated."""
REQUESTS, BATCH_TOKENS = 16, 1024
DECODING: dict[str, dict[str, Any]] = {
    "dense": {"mlp_ratio": 0.4, "skip_layers": 0},
    "step": {"mlp_ratio": 0.0, "decode_ratio": 0.4},
    "rolling": {"mlp_ratio": 0.4, "skip_layers": 0},
}
"""decode -> the other settings of `--decode`; no prompt of "step" is pruned, which its decoding does not notice."""
TOGETHER, TOKENS, PROMPT = (1, 4, 16), 32, 64
"""Of `--decode`: requests at once, tokens that each decodes, tokens of a prompt."""


def run(model: Any, prompts: torch.Tensor, generated: int) -> float:
    """Processor time in seconds for greedy answers to the rows of prompts [N, T]."""
    how = GenerationConfig(max_new_tokens=generated, do_sample=False, eos_token_id=None, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=256, page_size=32, max_batch_tokens=BATCH_TOKENS)
    start = time.process_time()
    found = model.generate_batch(prompts.tolist(), how, small)
    seconds = time.process_time() - start
    assert [len(answer.generated_tokens) for answer in found.values()] == [generated] * len(prompts)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default=PYTHON_DOCS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/continuous-batching.json"))
    parser.add_argument("--decode", help="comma-separated, of " + ", ".join(DECODING))
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense, tokenizer = load("smollm2", torch.bfloat16)
    text = sequences(read(options.text), tokenizer, 64, 512).flatten()
    if options.decode:
        write_json(options.out.with_stem("engine-decoding"), _decoding(dense, text, options.decode, options.rounds))
        return
    models = {0.0: dense}
    for ratio in RATIOS[1:]:
        models[ratio] = pp_fx.transform(copy.deepcopy(dense), pp_fx.ProbePruningConfig(mlp_ratio=ratio))
    draw = torch.Generator().manual_seed(0)
    seconds: dict[str, dict[float, list[float]]] = {name: {ratio: [] for ratio in RATIOS} for name in LOADS}
    for round_ in range(-1, options.rounds):
        for name, (length, generated) in LOADS.items():
            starts = torch.randint(0, len(text) - length, (REQUESTS,), generator=draw)
            prompts = torch.stack([text[i : i + length] for i in starts.tolist()])
            for ratio, model in models.items():
                taken = run(model, prompts if round_ >= 0 else prompts[:2], generated)
                if round_ >= 0:  # the round before is a short one, to warm up
                    seconds[name][ratio].append(taken)
        print(seconds, flush=True)
    rows = [_row(ratio, seconds) for ratio in RATIOS]
    write_json(options.out, {"loads": LOADS, "requests": REQUESTS, "batch_tokens": BATCH_TOKENS, "rows": rows})
    series = {name: [row[name]["ratio"] for row in rows] for name in LOADS}
    title = f"SmolLM2, generate_batch, {REQUESTS} requests at once"
    bars(options.out.with_suffix(".png"), title, "processor time / dense", [row["label"] for row in rows], series)


def _decoding(dense: Any, text: torch.Tensor, decodes: str, rounds: int) -> dict[str, Any]:
    """Processor time of a decode step, in ms, of a stock model and by each `decode`, taking turns."""
    models = {"stock": dense}
    for decode in decodes.split(","):
        settings = pp_fx.ProbePruningConfig(decode=decode, **DECODING[decode])
        models[decode] = pp_fx.transform(copy.deepcopy(dense), settings)
    found: dict[str, dict[int, list[float]]] = {name: {count: [] for count in TOGETHER} for name in models}
    for round_ in range(-1, rounds):
        for count in TOGETHER:
            prompts = text[: count * PROMPT].view(count, PROMPT)
            for name, model in models.items():
                taken = run(model, prompts, 1 + TOKENS) - run(model, prompts, 1)
                if round_ >= 0:
                    found[name][count].append(1000 * taken / TOKENS)
        print(found, flush=True)
    rows = [
        {
            "decode": name,
            "requests": count,
            "ms": times,
            "tokens_per_second": 1000 * count / statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(times, found["stock"][count], strict=True)),
        }
        for name, counts in found.items()
        for count, times in counts.items()
    ]
    return {"prompt": PROMPT, "tokens": TOKENS, "settings": DECODING, "rows": rows}


def _row(ratio: float, seconds: dict[str, dict[float, list[float]]]) -> dict[str, Any]:
    """Medians of one model; its ratio is the median over the rounds."""
    row: dict[str, Any] = {"label": f"MLP {ratio:.0%}" if ratio else "dense, stock", "mlp_ratio": ratio}
    for name, (length, generated) in LOADS.items():
        own, dense = seconds[name][ratio], seconds[name][0.0]
        row[name] = {
            "seconds": own,
            "tokens_per_second": REQUESTS * (length + generated) / statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, dense, strict=True)),
        }
    return row


if __name__ == "__main__":
    main()
