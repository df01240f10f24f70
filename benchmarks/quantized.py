"""Pruned, quantized, or both: perplexity and time of one model's decoder layers in bf16 or fp32, int8 and int4.

    python benchmarks/quantized.py MODEL --text-dir wikitext-2 --out benchmarks/results/quantized

MODEL is a folder, hub id or GGUF file; the folder holds test.txt and valid.txt of WikiText-2. int8: torchao's
Int8WeightOnlyConfig, a scale for each output row; int4: IntxWeightOnlyConfig, a scale for each 32 numbers of a row; of
the decoder layers. Perplexity: 8 x 512 tokens of the test text as one batch, calibrated on 32 x 512 of the other,
history frozen. Time: `pp_fx.bench`, one thread, compiled, both sides frozen by Inductor, the decoder blocks; every row
interleaved with the dense model of the same weights. Solved programs: quantized_tasks.py. `python docs/measured.py`
writes the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from quantized_models import CONFIGS, DTYPES, block_bytes, loaded
from report import write_json
from rich.console import Console
from rich.progress import track
from torch import Tensor

import pp_fx
from pp_fx.bench import bench
from pp_fx.evaluate import evaluate
from pp_fx.text import PYTHON_DOCS, read, sequences

RATIOS = (0.1, 0.2, 0.4)
PHASES: dict[str, dict[str, Any]] = {
    "decode 1 x 128": {"phase": "decode", "new_tokens": 48, "freezing": True},
    "prefill 1 x 512": {"phase": "prefill", "freezing": True},
}
KEYS = ("dense_ms", "pruned_ms", "ratio", "ideal")


def timed(model: Any, ids: Tensor, config: pp_fx.ProbePruningConfig, phases: list[str]) -> dict[str, Any]:
    """Phase -> time and bytes against the dense model of these weights."""
    found = {}
    for phase in phases:
        given = PHASES[phase]
        length = 128 if given["phase"] == "decode" else 512
        result = bench(model, ids[:1, :length], config, compiled=True, **given)
        found[phase] = {key: result[key] for key in KEYS}
        torch.compiler.reset()
    return found


def perplexity(model: Any, test: Tensor, sample: Tensor, ratio: float, dense: Any) -> dict[str, Any]:
    """Of a ratio, and how far above the dense model of these weights."""
    pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=ratio))
    try:
        pp_fx.calibrate(model, sample)
        with pp_fx.history_frozen(model):
            found = evaluate(model, test, len(test))
    finally:
        pp_fx.restore(model)
    return {"ppl": found.ppl, "nll_above_dense": found.nll - dense.nll, "nll_stderr": found.stderr_vs(dense)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text-dir", type=Path, required=True, help="folder with test.txt and valid.txt")
    parser.add_argument("--prefill", action="store_true", help="time prompts, too: several minutes a row")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="fp32 where bf16 has no products")
    parser.add_argument("--weights", nargs="*", choices=list(CONFIGS), default=list(CONFIGS), help="beside the dtype's")
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS, help="of MLP channels, beside 0")
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 32), help="sequences of both texts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantized"))
    options = parser.parse_args()
    found: dict[str, Any] = {"model": Path(options.model).name, "dtype": options.dtype, "rows": []}
    phases = list(PHASES) if options.prefill else list(PHASES)[:1]
    tested, sampled = options.tokens
    for weights in track((options.dtype, *options.weights), "weights", console=Console(stderr=True)):
        model, tokenizer = loaded(options.model, weights, options.dtype)
        test = sequences(read(str(options.text_dir / "test.txt")), tokenizer, tested, 512)
        sample = sequences(read(str(options.text_dir / "valid.txt")), tokenizer, sampled, 512)
        code = sequences(read(PYTHON_DOCS), tokenizer, 16, 512)
        dense = evaluate(model, test, len(test), progress=f"{weights}, dense")
        size = block_bytes(model, weights)
        made: dict[str, Any] = {"weights": weights, "mlp_ratio": 0.0, "block_bytes": size, "ppl": dense.ppl}
        found["rows"].append(made)
        for ratio in options.ratios:
            made = {"weights": weights, "mlp_ratio": ratio, "block_bytes": size}
            made |= perplexity(model, test, sample, ratio, dense)
            found["rows"].append(made | timed(model, code, pp_fx.ProbePruningConfig(mlp_ratio=ratio), phases))
            write_json(options.out.with_suffix(".json"), found)  # what was measured stays if this is stopped
        del model
    _add_times_of_dense(found["rows"], phases, options.dtype)
    write_json(options.out.with_suffix(".json"), found)
    _plot(options.out.with_suffix(".png"), found)


def _add_times_of_dense(rows: list[dict[str, Any]], phases: list[str], dtype: str) -> None:
    """Every row's time against dense of this dtype; a dense model's is the median over the runs it was measured in."""
    for phase in phases:
        alone = {}
        for weights in {r["weights"] for r in rows}:
            runs = [r[phase]["dense_ms"] for r in rows if r["weights"] == weights and phase in r]
            alone[weights] = sorted(runs)[len(runs) // 2]
        for made in rows:
            ratio = made[phase]["ratio"] if phase in made else 1.0
            made.setdefault(phase, {})["against_dense"] = ratio * alone[made["weights"]] / alone[dtype]


def _plot(file: Path, found: dict[str, Any]) -> None:
    """Perplexity against the time of a decode step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for weights, color in zip((found["dtype"], *CONFIGS), ("#2a6f97", "#e8590c", "#2f9e44"), strict=True):
        rows = [r for r in found["rows"] if r["weights"] == weights]
        if not rows:
            continue
        x, y = [r["decode 1 x 128"]["against_dense"] for r in rows], [r["ppl"] for r in rows]
        axes.plot(x, y, marker="o", color=color, label=weights)
        for a, b, made in zip(x, y, rows, strict=True):
            axes.annotate(f"{made['mlp_ratio']:.0%}", (a, b), xytext=(5, 4), textcoords="offset points", size=8)
    axes.set_xlabel(f"time of a decode step, dense {found['dtype']} = 1")
    axes.set_ylabel("perplexity, WikiText-2")
    axes.set_title(found["model"])
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
