"""What pp_fx costs before it saves anything: import, transform, restore, memory.

python benchmarks/costs.py --out benchmarks/results/costs
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from report import write_json
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import pp_fx
from pp_fx.measure.bytes import state_bytes, weight_bytes
from pp_fx.models import load


def import_seconds(module: str) -> float:
    """Of a fresh process, the fastest of three."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    runs = (subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(3))
    return min(float(run.stdout) for run in runs)


def transform_costs(model: Any) -> dict[str, float]:
    """Seconds of transform and restore, and bytes held beyond the weights."""
    start = time.perf_counter()
    pp_fx.transform(model)
    transformed = time.perf_counter()
    held = state_bytes(model)
    pp_fx.restore(model)
    return {
        "transform_seconds": transformed - start,
        "restore_seconds": time.perf_counter() - transformed,
        "state_bytes": held,
        "weight_bytes": weight_bytes(model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/costs"))
    options = parser.parse_args()
    imports = {name: import_seconds(name) for name in ("torch, transformers.models.llama.modeling_llama", "pp_fx")}
    small, _ = load("smollm2", torch.bfloat16)
    rows = {"SmolLM2-135M, 30 layers": transform_costs(small)}
    del small
    config = LlamaConfig(num_hidden_layers=8)
    large = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rows["Llama-2-7B shapes, 8 layers"] = transform_costs(large)
    table = Table("model", "transform s", "restore s", "state / weights")
    for name, row in rows.items():
        share = row["state_bytes"] / row["weight_bytes"]
        table.add_row(name, f"{row['transform_seconds']:.1f}", f"{row['restore_seconds']:.1f}", f"{share:.2%}")
    console = Console()
    console.print(table)
    console.print({name: f"{seconds:.1f} s" for name, seconds in imports.items()})
    write_json(options.out.with_suffix(".json"), {"imports": imports, "rows": rows})


if __name__ == "__main__":
    main()
