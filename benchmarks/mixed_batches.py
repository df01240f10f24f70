"""What a batch of different topics loses by its one selection: mixed, grouped by topic, and each sequence alone.

Ten sequences of a text and ten of Python's documentation, 512 tokens each; the history is frozen.

    python benchmarks/mixed_batches.py --text test.txt --calibration valid.txt --out benchmarks/results/mixed-batches
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from report import STICKY, bars, write_json
from rich.console import Console
from rich.table import Table

import pp_fx
from pp_fx.evaluate import evaluate
from pp_fx.models import load
from pp_fx.text import PYTHON_DOCS, read, sequences

GROUPS = {"mixed batch of 20": 20, "two batches of 10, by topic": 10, "each sequence alone": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mixed-batches"))
    options = parser.parse_args()
    model, tokenizer = load("smollm2", torch.bfloat16)
    first = sequences(read(options.text), tokenizer, 10, 512)
    second = sequences(read(PYTHON_DOCS), tokenizer, 10, 512, skip=100)
    ids = torch.cat([first, second])
    dense = evaluate(model, ids, 20, progress="dense")
    pp_fx.transform(model, {**STICKY, "mlp_ratio": 0.4})
    pp_fx.calibrate(model, sequences(read(options.calibration), tokenizer, 64, 512))
    with pp_fx.history_frozen(model):
        found = {label: evaluate(model, ids, size, progress=label) for label, size in GROUPS.items()}
    mixed = found["mixed batch of 20"]
    rows = [
        {
            "label": label,
            "ppl": one.ppl,
            "ppl_text": one.per_sequence[:10].mean().exp().item(),
            "ppl_docs": one.per_sequence[10:].mean().exp().item(),
            "nll_against_mixed": one.nll - mixed.nll,
            "nll_stderr": one.stderr_vs(mixed),
        }
        for label, one in found.items()
    ]
    write_json(options.out.with_suffix(".json"), {"dense": dense.to_dict(), "rows": rows})
    series = {"the text": "ppl_text", "Python's documentation": "ppl_docs"}
    bars(
        options.out.with_suffix(".png"),
        "SmolLM2-135M, MLP 40%: one selection for a batch of two topics",
        "perplexity",
        [r["label"] for r in rows],
        {label: [r[key] for r in rows] for label, key in series.items()},
    )
    table = Table(title=f"dense {dense.ppl:.2f}")
    for column in ("", "perplexity", *series, "nll against mixed"):
        table.add_column(column)
    for r in rows:
        numbers = [f"{r[key]:.2f}" for key in ("ppl", *series.values())]
        table.add_row(r["label"], *numbers, f"{r['nll_against_mixed']:+.4f} ± {r['nll_stderr']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
