"""Prefill time of the decoder blocks, pruned against dense, interleaved in one process.

One thread and CPU time (`time.thread_time`) by default, because barriers on a busy machine make wall time of several
threads meaningless; wall time is reported beside. Every layer is compiled on its own (`layer.compile(fullgraph=True)`).

    python benchmarks/prefill.py --batch 4 --length 512 --json prefill.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

import pp_fx
from pp_fx.cli import versions
from pp_fx.macs import count_macs, kept_per_layer
from pp_fx.models import load
from pp_fx.text import read, sequences


def blocks_only(model, hidden, arguments):
    """Run the decoder layers alone on recorded arguments."""
    for layer in model.model.layers:
        hidden = layer(hidden, **arguments)
    return hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--mlp-ratio", type=float, default=0.4)
    parser.add_argument("--attention-ratio", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()

    dense, tokenizer = load(options.model, torch.bfloat16)
    ids = sequences(read("python-docs"), tokenizer, options.batch, options.length)
    pruned = copy.deepcopy(dense)
    config = pp_fx.ProbePruningConfig(mlp_ratio=options.mlp_ratio, attention_ratio=options.attention_ratio)
    pp_fx.transform(pruned, config)
    pp_fx.calibrate(pruned, ids, batch_size=options.batch)
    models = {"dense": dense, "pruned": pruned}
    if not options.eager:
        torch._dynamo.config.recompile_limit = 64  # one entry per layer object
        for model in models.values():
            for layer in model.model.layers:
                layer.compile(fullgraph=True)

    times: dict[str, dict[str, list[float]]] = {n: {"cpu": [], "wall": []} for n in models}
    with torch.no_grad():
        hidden = dense.get_input_embeddings()(ids)
        positions = torch.arange(options.length)[None]
        arguments = {
            "position_ids": positions,
            "position_embeddings": dense.model.rotary_emb(hidden, positions),
        }
        for _ in range(2):
            for model in models.values():
                blocks_only(model, hidden, arguments)
        for _ in track(range(options.repeats), "time", console=console):
            for name, model in models.items():
                wall, cpu = time.perf_counter(), time.thread_time()
                blocks_only(model, hidden, arguments)
                times[name]["cpu"].append(time.thread_time() - cpu)
                times[name]["wall"].append(time.perf_counter() - wall)

    macs = count_macs(pruned, options.batch, options.length)
    core = attention_core_macs(dense.config, options.length)
    all_heads = dense.config.num_attention_heads * dense.config.num_hidden_layers
    kept_heads = sum(layer["heads"] for layer in kept_per_layer(pruned)) / all_heads
    ideal = (macs.pruned + core * kept_heads) / (macs.dense + core)
    median = {n: {k: statistics.median(v) for k, v in t.items()} for n, t in times.items()}
    ratio = median["pruned"]["cpu"] / median["dense"]["cpu"]
    with_probe = ideal + macs.probe / (macs.dense + core)
    result = {
        "batch": options.batch,
        "length": options.length,
        "threads": options.threads,
        "compiled": not options.eager,
        "config": config.to_dict(),
        "dense_ms": 1000 * median["dense"]["cpu"],
        "pruned_ms": 1000 * median["pruned"]["cpu"],
        "ratio": ratio,
        "wall_ratio": median["pruned"]["wall"] / median["dense"]["wall"],
        "ideal": ideal,
        "ideal_with_probe": with_probe,
        "ratio_over_ideal": ratio / ideal,
        "all_seconds": times,
        "versions": versions(),
    }
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print({k: round(v, 4) for k, v in result.items() if isinstance(v, float)})


def attention_core_macs(config, length: int) -> float:
    """MACs per token of scores and weighted values under a causal mask, all layers and heads."""
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return config.num_hidden_layers * 2 * width * (length + 1) / 2


if __name__ == "__main__":
    main()
