"""Programs that a model solves pruned, quantized, or both: HumanEval beside the bytes of its decoder layers.

    python benchmarks/quantized_tasks.py MODEL --problems 64 --out benchmarks/results/quantized-tasks

MODEL is a folder, hub id or GGUF file. int8: torchao's Int8WeightOnlyConfig, a scale for each output row; int4:
IntxWeightOnlyConfig with a scale for each 32 numbers of a row; of the decoder layers. Solved: as in generated.py, with
the default `decode="step"`, against the dense bf16 model's answers, in pairs. Bytes: as a file would hold them, half a
byte for a number of 4 bits (torchao keeps a byte for each in memory). The plot takes times from quantized.json, which
quantized.py has written beside it. `python docs/measured.py` writes the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from generated import quality, row
from quantized_models import block_bytes, loaded
from report import write_json
from rich.console import Console
from rich.progress import track

from pp_fx.measure.humaneval import read_problems, solve
from pp_fx.text import PYTHON_DOCS, read, sequences

WEIGHTS = ("bf16", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--weights", nargs="*", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.2], help="of MLP channels, beside 0")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantized-tasks"))
    options = parser.parse_args()
    problems, dense = read_problems(options.problems), None
    found: dict[str, Any] = {"model": Path(options.model).name, "problems": len(problems), "rows": []}
    for weights in dict.fromkeys(("bf16", *options.weights)):  # bf16 comes first: the others are compared with it
        model, tokenizer = loaded(options.model, weights)
        sample = sequences(read(PYTHON_DOCS), tokenizer, 16, 512)
        size = block_bytes(model, weights)
        ratios = [0.0, *(options.ratios if weights in options.weights else ())]
        for ratio in track(ratios, weights, console=Console(stderr=True)):
            if ratio:
                answers = quality(model, tokenizer, problems, 16, {"mlp_ratio": ratio, "decode": "step"}, sample)
            else:
                answers = solve(model, tokenizer, problems, batch=16, new_tokens=256)
            dense = dense or answers
            found["rows"].append({"weights": weights, "mlp_ratio": ratio, "block_bytes": size, **row(dense, answers)})
            write_json(options.out.with_suffix(".json"), found)  # what was measured stays if this is stopped
        del model
    times = json.loads(options.out.with_name("quantized.json").read_text(encoding="utf-8"))["rows"]
    draw_front(options.out.with_suffix(".png"), found, times)


def draw_front(file: Path, found: dict[str, Any], times: list[dict[str, Any]]) -> None:
    """Solved programs against the time of a decode step, where quantized.py has measured one; the best ones joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    step = {(r["weights"], r["mlp_ratio"]): r["decode 1 x 128"]["against_dense"] for r in times}
    points = []
    for weights, color in (("bf16", "#2a6f97"), ("int8", "#e8590c")):
        rows = [
            row for row in found["rows"] if (row["weights"], row["mlp_ratio"]) in step and row["weights"] == weights
        ]
        own = [(step[weights, row["mlp_ratio"]], row["solved"]) for row in rows]
        axes.plot(*zip(*own, strict=True), "o", color=color, label=weights)
        for place, made in zip(own, rows, strict=True):
            axes.annotate(f"{made['mlp_ratio']:.0%}", place, xytext=(5, 4), textcoords="offset points", size=8)
        points += own
    best = sorted(a for a in points if not any(b[0] <= a[0] and b[1] >= a[1] and b != a for b in points))
    axes.plot(*zip(*best, strict=True), "--", color="#888888", zorder=0, label="front")
    axes.set_xlabel("time of a decode step, dense bf16 = 1")
    axes.set_ylabel(f"solved of {found['problems']}")
    axes.set_title(f"{found['model']}: HumanEval, MLP dropped")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
