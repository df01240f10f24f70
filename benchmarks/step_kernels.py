"""The native kernels of a decode step beside a plain copy of the bytes that they read, and beside the dense products.

    python benchmarks/step_kernels.py --out benchmarks/results/step-kernels

One token, one thread, bf16 and int8, weights cold (other memory is written before every call), the sides in turn.
`gate`: the whole gate projection. `step`: up and output projection of the share of channels that is kept, chosen at
random. `dense`: one whole projection by what dense models run: bf16 packed by oneDNN (Inductor's freezing), int8 by
torch's `_weight_int8pack_mm` (Inductor's choice). `copy`: a copy, in whole rows, of the bytes that the step reads.
`python docs/measured.py` writes the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import write_json
from rich.console import Console
from rich.progress import track

from pp_fx.kernels import strongest
from pp_fx.kernels.packed_linear import pack, packed_linear

SHAPES = {"SmolLM2-135M": (1536, 576), "Qwen2.5-0.5B": (4864, 896), "Llama-3-8B": (14336, 4096)}
KEPT = (0.8, 0.6, 0.5)


def medians(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Microseconds of every side, in turn."""
    other = torch.zeros(2**24)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            other.add_(1)
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(found)[repeats // 2] * 1e6 for name, found in times.items()}


def measure(channels: int, hidden: int, int8: bool, repeats: int) -> dict[str, Any]:
    """Microseconds by side."""
    x = torch.randn(1, hidden).bfloat16()
    strength, factor = torch.rand(1, channels), torch.randn(1, channels).bfloat16()
    if int8:
        gate, up, down = (torch.randint(-127, 128, (channels, hidden), dtype=torch.int8) for _ in range(3))
        scales, out_scales = torch.rand(channels) / 100, torch.rand(hidden) / 100
        small = scales.bfloat16()
    else:
        gate, up, down = (torch.randn(channels, hidden).bfloat16() for _ in range(3))
        scales = out_scales = None
        packed = pack(gate)

    def step(kept: float) -> Any:
        count = int(kept * channels)
        return strongest.strongest(strength, factor, x, up, None, down, None, count, scales, out_scales)

    def dense() -> Any:
        return torch.ops.aten._weight_int8pack_mm(x, gate, small) if int8 else packed_linear(x, packed)

    memory = torch.empty_like(up)
    sides = {"gate": lambda: strongest.linear_rows(x, gate, None, scales), "dense": dense}
    for kept in KEPT:
        rows = int(kept * channels)
        sides[f"step {kept:.0%}"] = lambda kept=kept: step(kept)
        sides[f"copy {kept:.0%}"] = lambda rows=rows: (memory[:rows].copy_(up[:rows]), memory[:rows].copy_(down[:rows]))
    return medians(sides, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step-kernels"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"rows": []}
    runs = [(name, int8) for name in SHAPES for int8 in (False, True)]
    with torch.no_grad():
        for name, int8 in track(runs, "layers", console=Console(stderr=True)):
            us = measure(*SHAPES[name], int8, options.repeats)
            for kept in KEPT:
                mlp = {"ours": us["gate"] + us[f"step {kept:.0%}"], "dense": 3 * us["dense"], "whole": 3 * us["gate"]}
                row = {"model": name, "weights": "int8" if int8 else "bf16", "kept": kept, "us": us, "mlp_us": mlp}
                row["ratio"], row["against_own"] = mlp["ours"] / mlp["dense"], mlp["ours"] / mlp["whole"]
                row["copy_share"] = us[f"copy {kept:.0%}"] / us[f"step {kept:.0%}"]
                found["rows"].append(row)
    write_json(options.out.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
