"""All GPU figures in one run of at most 8 minutes: blocks of Llama-2-7B shapes, decoding, and the kernels' crossover.

    python benchmarks/gpu.py --out benchmarks/results/gpu

bf16, compiled, random weights (time does not depend on them), as many layers as `--layers` says. Prefill without KV
cache at 20 x 1024 (the paper's setting) and 1 x 2048, decoding at 1, 8 and 32 prompts; dense, pruned and static sides
are interleaved (`pp_fx.bench`). The crossover table says up to how many rows the Triton products with kept rows in
place are faster than a copy and a product of cuBLAS: the value for `ProbePruningConfig.kernel_rows`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from report import bars, write_json
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import pp_fx
from pp_fx.bench import bench
from pp_fx.kernels import gather_linear, gather_output

PREFILL = ((20, 1024), (1, 2048))
DECODE = (1, 8, 32)
ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
BUDGET = 8 * 60


def llama(layers: int) -> Any:
    """Llama-2-7B's shapes."""
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def median_ms(call: Any, repeats: int = 20) -> float:
    """Median of device times, after 3 calls that do not count."""
    times = []
    for index in range(3 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def crossover(hidden: int = 4096, channels: int = 11008, share: float = 0.6) -> list[dict[str, float]]:
    """Milliseconds of both products, copied and in place, by rows."""
    weight = torch.randn(channels, hidden, device="cuda", dtype=torch.bfloat16)
    kept = torch.randperm(channels, device="cuda")[: int(share * channels)].sort().values
    found = []
    for rows in ROWS:
        x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
        z = torch.randn(rows, len(kept), device="cuda", dtype=torch.bfloat16)
        found.append(
            {
                "rows": rows,
                "copied": median_ms(lambda x=x, z=z: (x @ weight[kept].t(), z @ weight[kept])),
                "in_place": median_ms(
                    lambda x=x, z=z: (gather_linear(x, weight, kept), gather_output(z, weight, kept))
                ),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    console, began = Console(), time.monotonic()
    table = Table("phase", "dense ms", "pruned ms", "static / dense", "pruned / dense", "ideal", "/ ideal")
    rows: list[dict[str, Any]] = []
    settings = [("prefill", *shape) for shape in PREFILL] + [("decode", batch, 512) for batch in DECODE]
    for heads in (0.4, 0.0):  # the paper's setting prunes both branches
        for phase, batch, length in settings:
            if time.monotonic() - began > BUDGET:
                console.print(f"left out for want of time: {phase} {batch} x {length}, heads {heads}")
                continue
            config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=heads, skip_layers=0)
            ids = torch.randint(0, 32000, (batch, length), device="cuda")
            model = llama(options.layers)
            found = bench(model, ids, config, phase=phase, compiled=True, repeats=9, new_tokens=64)
            del model
            torch.cuda.empty_cache()
            rows.append({"heads": heads, **found})
            ideal = found.get("ideal_with_probe", found["ideal"])
            static = found["static_ratio"]
            times = [f"{found[side]:.2f}" for side in ("dense_ms", "pruned_ms")]
            ratios = [f"{x:.3f}" for x in (found["ratio"], ideal, found["ratio"] / ideal)]
            name = f"{phase} {batch} x {length}, heads {heads:.0%}"
            table.add_row(name, *times, "" if static is None else f"{static:.3f}", *ratios)
            console.print(f"{name}: {found['ratio']:.3f}")
    console.print(table)
    by_rows = crossover()
    best = max((int(r["rows"]) for r in by_rows if r["in_place"] < r["copied"]), default=0)
    console.print(f"kernel_rows={best}", by_rows)
    device = torch.cuda.get_device_name()
    result = {"device": device, "rows": rows, "crossover": by_rows, "kernel_rows": best}
    write_json(options.out.with_suffix(".json"), result)
    labels = [f"{r['settings']['phase']} {r['settings']['batch']}, heads {r['heads']:.0%}" for r in rows]
    ideals = [r.get("ideal_with_probe", r["ideal"]) for r in rows]
    series = {"measured": [r["ratio"] for r in rows], "ideal": ideals}
    bars(options.out.with_suffix(".png"), f"{device}, Llama-2-7B shapes", "time, pruned / dense", labels, series)


if __name__ == "__main__":
    main()
