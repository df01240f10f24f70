"""The README's one table: perplexity and time of SmolLM2-135M dense, with 20% and with 40% of its MLP channels dropped.

    python benchmarks/headline.py --text-dir wikitext-2 --out benchmarks/results/headline

The folder holds test.txt and valid.txt of WikiText-2. Perplexity as in perplexity.py: bf16, the first 20 x 512 tokens
of the test text as one batch, calibrated on 64 x 512 of the other. Time as in suite.py: bf16, compiled, one thread, one
process a shape; while decoding both sides are frozen by Inductor, so that dense weights are packed, too.
`python docs/measured.py` writes the table from the JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from report import write_json
from rich.console import Console
from rich.progress import track
from suite import DECODE, run

import pp_fx
from pp_fx.evaluate import evaluate
from pp_fx.models import load
from pp_fx.text import read, sequences

MODEL, RATIOS = "smollm2", (0.2, 0.4)
SHAPES: list[dict[str, Any]] = [
    {"phase": "prefill", "batch": 4, "length": 512, "attention": "sdpa"},
    {**DECODE, "batch": 8, "freezing": True},
    {**DECODE, "batch": 1, "freezing": True},
]


def perplexities(model: Any, test: torch.Tensor, sample: torch.Tensor) -> dict[str, Any]:
    """Of the dense model ("0.0") and at every ratio, as one batch, the history frozen."""
    dense = evaluate(model, test, len(test), progress="dense")
    rows: dict[str, Any] = {"0.0": {"ppl": dense.ppl, "nll": dense.nll}}
    for ratio in RATIOS:
        pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=ratio))
        pp_fx.calibrate(model, sample)
        with pp_fx.history_frozen(model):
            found = evaluate(model, test, len(test), progress=f"MLP {ratio:.0%}")
        rows[str(ratio)] = {"ppl": found.ppl, "nll": found.nll, "nll_stderr_vs_dense": found.stderr_vs(dense)}
        pp_fx.restore(model)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-dir", type=Path, required=True, help="folder with test.txt and valid.txt")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/headline"))
    options = parser.parse_args()
    model, tokenizer = load(MODEL, torch.bfloat16)
    test = sequences(read(str(options.text_dir / "test.txt")), tokenizer, 20, 512)
    sample = sequences(read(str(options.text_dir / "valid.txt")), tokenizer, 64, 512)
    found: dict[str, Any] = {"model": MODEL, "perplexity": perplexities(model, test, sample), "results": []}
    write_json(options.out.with_suffix(".json"), found)  # what was measured stays if this is stopped
    del model  # the other processes measure alone
    shapes = [{**shape, "mlp_ratio": ratio} for ratio in RATIOS for shape in SHAPES]
    for shape in track(shapes, "time", console=Console(stderr=True)):
        found["results"].append(run(MODEL, shape, {}))
        write_json(options.out.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
