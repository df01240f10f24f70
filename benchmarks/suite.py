"""Run `pp-fx bench` over prefill and decode shapes, one process each, and write table, plot and JSON.

    python benchmarks/suite.py --out benchmarks/results/cpu

The attention implementation is the one with which the dense model is faster at that shape (CPU: compiled eager
attention up to 256 tokens, SDPA above), so that pruning is compared with the best dense model.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import bars, write_json
from rich.console import Console
from rich.progress import track

SHAPES: list[dict[str, Any]] = [
    {"phase": "prefill", "batch": 64, "length": 32, "attention": "eager"},
    {"phase": "prefill", "batch": 16, "length": 128, "attention": "eager"},
    {"phase": "prefill", "batch": 8, "length": 256, "attention": "eager"},
    {"phase": "prefill", "batch": 4, "length": 512, "attention": "sdpa"},
    *(
        {"phase": "decode", "batch": b, "length": 128, "new_tokens": 96, "attention": "eager", "dtype": d}
        for d in ("bfloat16", "float32")
        for b in (1, 8)
    ),
    *(
        {"phase": "decode", "batch": b, "length": 128, "new_tokens": 96, "attention": "eager", "freezing": True}
        for b in (1, 8)
    ),
]


def run(model: str, shape: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        named = {f"--{key.replace('_', '-')}": value for key, value in shape.items()}
        options = [part for key, value in named.items() for part in ([key] if value is True else [key, str(value)])]
        command = [sys.executable, "-m", "pp_fx.cli", "bench", model, *options, "--compile", "--json", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text(encoding="utf-8"))


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    flags = {"avx512_bf16", "amx_bf16", "avx512f"} & set(next(x for x in lines if x.startswith("flags")).split())
    return next(x.split(":")[1].strip() for x in lines if x.startswith("model name")) + f" ({', '.join(sorted(flags))})"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row a shape; ideal includes the probe for prefill."""
    lines = [
        "| phase, batch x length | dtype | core | dense ms | pruned ms | ratio | ideal | / ideal | with head (ideal) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        s, head = r["settings"], r["with_head"]
        ideal, head_ideal = (x.get("ideal_with_probe", x["ideal"]) for x in (r, head))
        lines.append(
            f"| {s['phase']}, {s['batch']} x {s['length']} | {_weights(s)} | {s['attention']} | {r['dense_ms']:.1f} | "
            f"{r['pruned_ms']:.1f} | **{r['ratio']:.3f}** | {ideal:.3f} | {r['ratio'] / ideal:.3f} | "
            f"{head['ratio']:.3f} ({head_ideal:.3f}) |"
        )
    return "\n".join(lines) + "\n"


def _weights(settings: dict[str, Any]) -> str:
    return settings["dtype"] + (" frozen" if settings.get("freezing") else "")


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Measured ratio beside the ideal one."""
    shapes = [r["settings"] for r in results]
    ideals = [r.get("ideal_with_probe", r["ideal"]) for r in results]
    bars(
        file,
        f"{results[0]['model']}, MLP 40%, decoder blocks, compiled, one CPU thread",
        "time, pruned / dense",
        [f"{s['phase']} {s['batch']} x {s['length']} {_weights(s)}" for s in shapes],
        {"measured": [r["ratio"] for r in results], "ideal (MACs or bytes, probe included)": ideals},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--phase", choices=("prefill", "decode"), help="only these shapes; the file's others stay")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    options = parser.parse_args()
    console = Console()
    shapes = [s for s in SHAPES if options.phase in (None, s["phase"])]
    results = [run(options.model, shape) for shape in track(shapes, "benchmarks", console=console)]
    if options.phase is not None and options.out.with_suffix(".json").exists():
        before = json.loads(options.out.with_suffix(".json").read_text(encoding="utf-8"))["results"]
        others = [r for r in before if r["settings"]["phase"] != options.phase]
        results = others + results if options.phase == "decode" else results + others
    write_json(options.out.with_suffix(".json"), {"processor": processor(), "results": results})
    options.out.with_suffix(".md").write_text(f"{processor()}\n\n{table(results)}", encoding="utf-8")
    plot(results, options.out.with_suffix(".png"))
    console.print(table(results))


if __name__ == "__main__":
    main()
