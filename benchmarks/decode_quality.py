"""Perplexity while decoding: sticky selection, re-probing, and `drift_threshold`, also on a text that changes topic.

8 prompts x 256 tokens, then 64 teacher-forced tokens one at a time (the same text goes on), or 192 tokens of Python's
documentation (the topic changes). One batch, bf16, calibrated on 64 x 512 tokens of the calibration text.

    python benchmarks/decode_quality.py --text test.txt --calibration valid.txt --out benchmarks/results/decode-quality
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from report import STICKY, bars, write_json
from rich.console import Console
from rich.table import Table

import pp_fx
from pp_fx.evaluate import evaluate_decoding
from pp_fx.models import load
from pp_fx.text import PYTHON_DOCS, read, sequences

PROMPT, SAME, CHANGED = 256, 64, 192


def variants() -> dict[str, pp_fx.ProbePruningConfig]:
    paper = pp_fx.ProbePruningConfig.paper

    def config(**changes: Any) -> pp_fx.ProbePruningConfig:
        return pp_fx.ProbePruningConfig.from_dict({**STICKY, "mlp_ratio": 0.4, **changes})

    thresholds = {f"sticky 40%, drift threshold {t}": config(drift_threshold=t) for t in (0.6, 0.7, 0.8, 0.9)}
    return {
        "paper 20%": paper(0.2, 0.0, round_to=1),
        "paper 40%": paper(0.4, 0.0, round_to=1),
        "sticky 20%": config(mlp_ratio=0.2),
        "sticky 40%": config(),
        **thresholds,
        "sticky 40%, decode=probe": config(decode="probe"),
        "sticky 40%, decode=probe, every token": config(decode="probe", reprobe_every=1),
        "sticky 40%, decode=dense": config(decode="dense"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode-quality"))
    options = parser.parse_args()
    console = Console()
    model, tokenizer = load(options.model, torch.bfloat16)
    ids = sequences(read(options.text), tokenizer, options.prompts, PROMPT + SAME)
    prompts = ids[:, :PROMPT]
    other = sequences(read(PYTHON_DOCS), tokenizer, options.prompts, CHANGED)
    sample = sequences(read(options.calibration), tokenizer, 64, 512)
    texts = {"same topic": ids[:, PROMPT:], "topic changes": other}

    dense = {name: evaluate_decoding(model, prompts, text, progress=f"dense, {name}") for name, text in texts.items()}
    results = {"dense": {name: {"ppl": e.ppl, "nll": e.nll} for name, e in dense.items()}}
    sticky = {}
    for label, config in variants().items():
        pp_fx.transform(model, config)
        pp_fx.calibrate(model, sample, progress=False)
        results[label] = {}
        for name, text in texts.items():
            with pp_fx.history_frozen(model):
                found = evaluate_decoding(model, prompts, text, progress=f"{label}, {name}")
            row = {"ppl": found.ppl, "nll": found.nll, "stderr_vs_dense": found.stderr_vs(dense[name])}
            if label == "sticky 40%":
                sticky[name] = found
            if name in sticky:
                row |= {
                    "nll_vs_sticky": found.nll - sticky[name].nll,
                    "stderr_vs_sticky": found.stderr_vs(sticky[name]),
                }
            results[label][name] = row
        pp_fx.restore(model)

    table = Table(title=f"Decoding, {options.prompts} prompts x {PROMPT} tokens, perplexity (nll against sticky)")
    for column in ("", *texts):
        table.add_column(column)
    for label, rows in results.items():
        cells = []
        for row in rows.values():
            extra = ""
            if "nll_vs_sticky" in row and label != "sticky 40%":
                extra = f" ({row['nll_vs_sticky']:+.3f} ± {row['stderr_vs_sticky']:.3f})"
            cells.append(f"{row['ppl']:.2f}{extra}")
        table.add_row(label, *cells)
    console.print(table)
    result = {"model": options.model, "prompts": options.prompts, "results": results}
    write_json(options.out.with_suffix(".json"), result)
    series = {name: [rows[name]["ppl"] for rows in results.values()] for name in texts}
    title = f"{options.model}: decoding after {options.prompts} prompts x {PROMPT} tokens"
    bars(options.out.with_suffix(".png"), title, "perplexity", list(results), series)


if __name__ == "__main__":
    main()
