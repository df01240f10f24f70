"""Perplexity of dense and pruned models by the standard protocol, with calibration in and out of domain.

The first 20 x 512 tokens of the text as one batch, no BOS; calibration on 64 x 512 tokens of the calibration text or
of Python's documentation. The rows in FRESH on the next 40 sequences, too, in batches of 20. The history is frozen.

    python benchmarks/perplexity.py --text test.txt --calibration valid.txt --out benchmarks/results/perplexity
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from report import STICKY, bars, processor, write_json
from rich.console import Console
from rich.table import Table

import pp_fx
from pp_fx.evaluate import Evaluation, evaluate
from pp_fx.macs import count_macs
from pp_fx.models import load
from pp_fx.text import PYTHON_DOCS, read, sequences


def sticky(mlp_ratio: float, attention_ratio: float = 0.0) -> pp_fx.ProbePruningConfig:
    """Three layers dense, the probe's rows by the residual's norm."""
    ratios = {"mlp_ratio": mlp_ratio, "attention_ratio": attention_ratio}
    return pp_fx.ProbePruningConfig.from_dict({**STICKY, **ratios})


CONFIGS = {
    "sticky, MLP 20%": sticky(0.2),
    "sticky, MLP 40%": sticky(0.4),
    "sticky, MLP 41.5% (total MACs of the next row)": sticky(0.415),
    "paper preset, MLP 40%": pp_fx.ProbePruningConfig.paper(0.4, 0.0, round_to=1),
    "sticky, MLP 48.5% (total MACs of the next row)": sticky(0.485),
    "paper preset, MLP and attention 40%": pp_fx.ProbePruningConfig.paper(0.4, round_to=1),
    "sticky, 3 of 9 heads": sticky(0.0, 0.37),
    "paper preset, 3 of 9 heads": pp_fx.ProbePruningConfig.paper(0.0, 0.37),
}
FRESH = tuple(CONFIGS)[1:2] + tuple(CONFIGS)[3:6]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--only", default="", help="only rows with this in their label; the file's other rows stay")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/perplexity"))
    options = parser.parse_args()
    console = Console()
    model, tokenizer = load(options.model, torch.bfloat16)
    test = sequences(read(options.text), tokenizer, 20, 512)
    fresh = sequences(read(options.text), tokenizer, 40, 512, skip=20)
    samples = {
        "in domain": sequences(read(options.calibration), tokenizer, 64, 512),
        "out of domain": sequences(read(PYTHON_DOCS), tokenizer, 64, 512),
    }
    dense = evaluate(model, test, 20, progress="dense")
    wide = evaluate(copy.deepcopy(model).float(), test, 20, progress="dense, fp32")
    dense_fresh = evaluate(model, fresh, 20, progress="dense, fresh")
    file = options.out.with_suffix(".json")
    known = json.loads(file.read_text(encoding="utf-8"))["rows"] if options.only and file.exists() else []
    found = {row["label"]: {"processor": "not recorded", **row} for row in known}
    for label, config in CONFIGS.items():
        if options.only not in label:
            continue
        row: dict[str, Any] = {"label": label, "config": config.to_dict(), "processor": processor()}
        for name, sample in samples.items():
            pp_fx.transform(model, config)
            pp_fx.calibrate(model, sample)
            with pp_fx.history_frozen(model):
                row[name] = _against(dense, evaluate(model, test, 20, progress=f"{label}, {name}"))
                if label in FRESH:
                    row[name]["fresh"] = _against(dense_fresh, evaluate(model, fresh, 20, progress="fresh"))
            macs = count_macs(model, *test.shape)
            row["macs"] = {
                "pruned": macs.ideal,
                "probe": macs.probe / macs.dense,
                "compensation": macs.compensation / macs.dense,
            }
            pp_fx.restore(model)
        found[label] = row
    rows = [found[label] for label in CONFIGS if label in found]
    write_json(
        file,
        {
            "model": options.model,
            "dense": {"bfloat16": dense.to_dict(), "float32": wide.to_dict(), "fresh": dense_fresh.to_dict()},
            "rows": rows,
        },
    )
    bars(
        options.out.with_suffix(".png"),
        f"{options.model}: perplexity, 20 x 512 tokens",
        "perplexity",
        ["dense", *(r["label"] for r in rows)],
        {f"calibration {n}": [dense.ppl, *(r[n]["ppl"] for r in rows)] for n in samples},
    )
    table = Table(title=f"{options.model}: dense {dense.ppl:.2f} (bf16), {wide.ppl:.2f} (fp32)")
    for column in ("", "block MACs", *samples):
        table.add_column(column)
    for r in rows:
        share = " + ".join(f"{value:.1%}" for value in r["macs"].values())
        table.add_row(r["label"], share, *(_cell(r[n]) for n in samples))
    console.print(table)


def _against(dense: Evaluation, found: Evaluation) -> dict[str, Any]:
    return {"ppl": found.ppl, "nll": found.nll, "nll_stderr_vs_dense": found.stderr_vs(dense)}


def _cell(found: dict[str, Any]) -> str:
    fresh = f" (fresh {found['fresh']['ppl']:.2f})" if "fresh" in found else ""
    return f"{found['ppl']:.2f}{fresh}"


if __name__ == "__main__":
    main()
