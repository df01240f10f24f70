"""Blocks of large models on this CPU: Llama-3.2-1B, Llama-2-7B, Llama-3-8B and OPT-13B shapes, random weights.

    python benchmarks/blocks.py --out benchmarks/results/blocks

One pruned layer of each, MLP 40%, bf16, compiled, one thread, CPU time, dense and pruned (and static, where weights are
neither fused nor biased) interleaved by `pp_fx.bench`; each shape in a process of its own, so that memory is bounded by
one layer. Time does not depend on the values of the weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from report import STICKY, bars, write_json
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

import pp_fx
from pp_fx.bench import bench

MODELS: dict[str, Any] = {
    "Llama-3.2-1B": lambda: LlamaConfig(hidden_size=2048, intermediate_size=8192, num_key_value_heads=8),
    "Llama-2-7B": lambda: LlamaConfig(hidden_size=4096, intermediate_size=11008),
    "Llama-3-8B": lambda: LlamaConfig(hidden_size=4096, intermediate_size=14336, num_key_value_heads=8),
    "OPT-13B": lambda: OPTConfig(hidden_size=5120, ffn_dim=20480, num_attention_heads=40, word_embed_proj_dim=5120),
}
SHAPES = (("prefill", 1, 64), ("prefill", 1, 512), ("prefill", 4, 256), ("decode", 1, 128), ("decode", 8, 128))


def measure(name: str, phase: str, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """One layer of a model's shapes."""
    torch.manual_seed(0)
    config = MODELS[name]()
    config.update({"num_hidden_layers": 1, "vocab_size": 1000, "max_position_embeddings": 2048})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation("sdpa")
    ids = torch.randint(5, 1000, (batch, length))
    settings = pp_fx.ProbePruningConfig.from_dict({**STICKY, "mlp_ratio": 0.4, "skip_layers": 0})
    # transformers' OPT does not compile with a StaticCache and without a mask
    compiled = phase == "prefill" or config.model_type != "opt"
    return bench(model, ids, settings, phase=phase, compiled=compiled, repeats=repeats, new_tokens=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/blocks"))
    parser.add_argument(
        "--one", nargs=4, metavar=("MODEL", "PHASE", "BATCH", "LENGTH"), help="for the processes inside"
    )
    options = parser.parse_args()
    if options.one:
        name, phase, batch, length = options.one
        write_json(options.out, measure(name, phase, int(batch), int(length), options.repeats))
        return
    console, rows = Console(), []
    table = Table("model", "phase", "dense ms", "pruned ms", "static / dense", "pruned / dense", "ideal", "/ ideal")
    for name in options.models.split(","):
        for shape in SHAPES:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, __file__, "--repeats", str(options.repeats), "--out", file.name]
                subprocess.run([*command, "--one", name, *map(str, shape)], check=True)
                found = json.loads(Path(file.name).read_text(encoding="utf-8"))
            rows.append({"model": name, **found})
            write_json(options.out.with_suffix(".json"), {"rows": rows})  # what was measured stays if this is stopped
            ideal, static = found.get("ideal_with_probe", found["ideal"]), found["static_ratio"]
            cells = [f"{found[k]:.1f}" for k in ("dense_ms", "pruned_ms")] + ["" if static is None else f"{static:.3f}"]
            cells += [f"{x:.3f}" for x in (found["ratio"], ideal, found["ratio"] / ideal)]
            table.add_row(name, f"{shape[0]} {shape[1]} x {shape[2]}", *cells)
            console.print(f"{name} {shape}: {found['ratio']:.3f}")
    console.print(table)
    labels = [
        f"{r['model']}, {r['settings']['phase']} {r['settings']['batch']} x {r['settings']['length']}" for r in rows
    ]
    ideals = [r.get("ideal_with_probe", r["ideal"]) for r in rows]
    series = {"measured": [r["ratio"] for r in rows], "ideal (MACs or bytes)": ideals}
    bars(
        options.out.with_suffix(".png"), "One block, MLP 40%, bf16, one thread", "time, pruned / dense", labels, series
    )


if __name__ == "__main__":
    main()
