"""Run `pp-fx bench` over prefill and decode shapes, one process each, and write table, plot and JSON.

    python benchmarks/suite.py --out benchmarks/results/cpu

The attention implementation is the one with which the dense model is faster at that shape (CPU: compiled eager
attention up to 256 tokens, SDPA above), so that pruning is compared with the best dense model. A row replaces the same
shape's row of the file; its other rows of this processor stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import STICKY, bars, processor, write_json
from rich.console import Console
from rich.progress import track

from pp_fx import ProbePruningConfig

DECODE = {"phase": "decode", "length": 128, "new_tokens": 48, "attention": "eager"}
SHAPES: list[dict[str, Any]] = [
    {"phase": "prefill", "batch": 64, "length": 32, "attention": "eager"},
    {"phase": "prefill", "batch": 16, "length": 128, "attention": "eager"},
    {"phase": "prefill", "batch": 8, "length": 256, "attention": "eager"},
    {"phase": "prefill", "batch": 4, "length": 512, "attention": "sdpa"},
    {"phase": "prefill", "batch": 4, "length": 512, "attention": "sdpa", "compile": False},
    {"phase": "prefill", "batch": 1, "length": 512, "attention": "sdpa"},
    {"phase": "prefill", "batch": 4, "length": 512, "attention": "sdpa", "compensation": False},
    *(
        {"phase": "prefill", "batch": b, "length": t, "attention": core, "repeats": 5, "attention_ratio": 0.4, **more}
        for b, t, core in ((1, 512, "sdpa"), (4, 256, "eager"), (20, 512, "sdpa"))
        for more in ({}, {"compensation": False})
    ),
    *(
        {"phase": "prefill", "batch": 1, "length": t, "attention": "eager", "guard": guard}
        for t in (32, 64)
        for guard in (False, True)
    ),
    *({**DECODE, "batch": b} for b in (1, 4, 8, 16, 64)),
    *({**DECODE, "batch": b, "dtype": "float32"} for b in (1, 8)),
    *({**DECODE, "batch": b, "freezing": True} for b in (1, 4, 8)),
    {**DECODE, "batch": 1, "attention_ratio": 0.4},
]


def run(model: str, given: dict[str, Any], config: dict[str, Any] = STICKY) -> dict[str, Any]:
    """`pp-fx bench` in a process of its own; a shape's keys are its options, over MLP 40% of a configuration."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        options = ["--json", str(out)]
        shape = {"compile": True, **given}
        settings = {"mlp_ratio": 0.4, **config}
        if not shape.pop("compensation", True):  # no option of the command
            settings |= {"mlp_compensation": None, "attention_compensation": None}
        shape["config"] = Path(folder, "config.json")
        shape["config"].write_text(ProbePruningConfig.from_dict(settings).to_json(), encoding="utf-8")
        for key, value in shape.items():
            name = "--" + key.replace("_", "-")
            if value is not False:
                options += [name] if value is True else [name, str(value)]
        command = [sys.executable, "-m", "pp_fx.cli", "bench", model, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {"shape": given, "processor": processor(), **json.loads(out.read_text(encoding="utf-8"))}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row a shape; ideal includes the probe for prefill."""
    lines = [
        "| phase, batch x length | core | dense ms | pruned ms | ratio | static | masked "
        "| ideal | / ideal | with head (ideal) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        head = r["with_head"]
        others = ["" if r.get(k) is None else f"{r[k]:.3f}" for k in ("static_ratio", "masked_ratio")]
        ideal, head_ideal = (x.get("ideal_with_probe", x["ideal"]) for x in (r, head))
        lines.append(
            f"| {label(r)} | {r['settings']['attention']} | {r['dense_ms']:.1f} | {r['pruned_ms']:.1f} | "
            f"**{r['ratio']:.3f}** | {' | '.join(others)} | {ideal:.3f} | "
            f"{r['ratio'] / ideal:.3f} | {head['ratio']:.3f} ({head_ideal:.3f}) |"
        )
    return "\n".join(lines) + "\n"


def label(result: dict[str, Any]) -> str:
    """Phase, batch x length, and what is not as in most rows."""
    settings, shape = result["settings"], result["shape"]
    marks = [
        "" if settings["dtype"] == "bfloat16" else "fp32",
        "" if settings["compiled"] else "uncompiled",
        "both frozen" if settings["freezing"] else "",
        "heads too" if "attention_ratio" in shape else "",
        "guard" if result["config"]["guard"] else "",
        "" if shape.get("compensation", True) else "no compensation",
    ]
    parts = [f"{settings['phase']}, {settings['batch']} x {settings['length']}", *(mark for mark in marks if mark)]
    return ", ".join(parts)


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Measured ratio beside the ideal one."""
    ideals = [r.get("ideal_with_probe", r["ideal"]) for r in results]
    bars(
        file,
        f"{results[0]['model']}, MLP 40%, decoder blocks, compiled, one CPU thread",
        "time, pruned / dense",
        [label(r) for r in results],
        {"measured": [r["ratio"] for r in results], "ideal (MACs or bytes, probe included)": ideals},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--phase", choices=("prefill", "decode"), help="only these shapes")
    parser.add_argument("--missing", action="store_true", help="only shapes that the file does not hold")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    options = parser.parse_args()
    console, file = Console(), options.out.with_suffix(".json")
    found = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else []
    here = [r for r in found if (r["model"], r["processor"]) == (options.model, processor())]
    results = {json.dumps(r["shape"]): r for r in here}
    shapes = [s for s in SHAPES if options.phase in (None, s["phase"])]
    if options.missing:
        shapes = [s for s in shapes if json.dumps(s) not in results]
    for shape in track(shapes, "benchmarks", console=console):
        results[json.dumps(shape)] = run(options.model, shape)
        # what was measured stays if this is stopped
        write_json(file, {"results": _ordered(results)})
    ordered = _ordered(results)
    file.with_suffix(".md").write_text(f"{processor()}\n\n{table(ordered)}", encoding="utf-8")
    plot(ordered, file.with_suffix(".png"))
    console.print(table(ordered))


def _ordered(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [results[key] for key in map(json.dumps, SHAPES) if key in results]


if __name__ == "__main__":
    main()
