"""The native kernels of a decode step beside a plain copy of the bytes that they read, and beside the dense products.

    python benchmarks/step_kernels.py --out benchmarks/results/step-kernels

One token, one thread, weights cold (other memory is written before every call), the sides in turn. Weights: bf16 or
fp32; int8 with a scale for each row; int4 with a scale for each 32 numbers of a row, a byte for each number.

`gate`: the whole gate projection. `step`: up and output projection of the share of channels that is kept, chosen at
random. `dense`: one whole projection by what dense models run: packed by oneDNN (Inductor's freezing), int8 by torch's
`_weight_int8pack_mm` (Inductor's choice), int4 widened (torchao's). `copy`: a copy, in whole rows, of the bytes that
the step reads. `python docs/measured.py` writes the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import write_json
from rich.console import Console
from rich.progress import track
from torch import Tensor

from pp_fx.kernels import strongest
from pp_fx.kernels.packed_linear import pack, packed_linear

SHAPES = {"SmolLM2-135M": (1536, 576), "Qwen2.5-0.5B": (4864, 896), "Llama-3-8B": (14336, 4096)}
KEPT = (0.8, 0.6, 0.5)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GROUP = 32


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


def measure(channels: int, hidden: int, weights: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Microseconds by side."""
    x = torch.randn(1, hidden).to(dtype)
    strength, factor = torch.rand(1, channels), torch.randn(1, channels).to(dtype)
    gate, up, down = (torch.randint(-8, 8, (channels, hidden), dtype=torch.int8) for _ in range(3))
    scales = out_scales = zeros = out_zeros = None
    if weights == "int8":
        scales, out_scales = torch.rand(channels) / 100, torch.rand(hidden) / 100
    elif weights == "int4":
        scales, out_scales = (
            torch.rand(gate.numel() // GROUP).view(*shape).to(dtype) / 100
            for shape in ((channels, hidden // GROUP), (channels // GROUP, hidden))
        )
        zeros, out_zeros = (torch.zeros_like(part, dtype=torch.int8) for part in (scales, out_scales))
    else:
        gate, up, down = (part.to(dtype) for part in (gate, up, down))

    def step(kept: float) -> Any:
        scaling = scales, out_scales, zeros, out_zeros
        return strongest.strongest(strength, factor, x, up, None, down, None, int(kept * channels), *scaling)

    memory = torch.empty_like(up)
    sides = {
        "gate": lambda: strongest.linear_rows(x, gate, None, scales, zeros),
        "dense": _dense(x, gate, scales, zeros),
    }
    for kept in KEPT:
        rows = int(kept * channels)
        sides[f"step {kept:.0%}"] = lambda kept=kept: step(kept)
        sides[f"copy {kept:.0%}"] = lambda rows=rows: (memory[:rows].copy_(up[:rows]), memory[:rows].copy_(down[:rows]))
    return medians(sides, repeats)


def _dense(x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None) -> Callable[[], Any]:
    if scales is None:
        packed = pack(weight)
        return lambda: packed_linear(x, packed)
    if zeros is None:
        rows = scales.to(x.dtype)
        return lambda: torch.ops.aten._weight_int8pack_mm(x, weight, rows)

    def widened() -> Tensor:
        groups = weight.view(*scales.shape, GROUP).to(x.dtype) - zeros.to(x.dtype)[..., None]
        return F.linear(x, (groups * scales[..., None]).flatten(1))

    return widened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="fp32 where bf16 has no products")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step-kernels"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"rows": []}
    runs = [(name, weights) for name in SHAPES for weights in (options.dtype, "int8", "int4")]
    with torch.no_grad():
        for name, weights in track(runs, "layers", console=Console(stderr=True)):
            us = measure(*SHAPES[name], weights, DTYPES[options.dtype], options.repeats)
            for kept in KEPT:
                mlp = {"ours": us["gate"] + us[f"step {kept:.0%}"], "dense": 3 * us["dense"], "whole": 3 * us["gate"]}
                row = {"model": name, "weights": weights, "kept": kept, "us": us, "mlp_us": mlp}
                row["ratio"], row["against_own"] = mlp["ours"] / mlp["dense"], mlp["ours"] / mlp["whole"]
                row["copy_share"] = us[f"copy {kept:.0%}"] / us[f"step {kept:.0%}"]
                found["rows"].append(row)
    write_json(options.out.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
