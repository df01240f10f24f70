"""What a generated task costs: HumanEval solved and time per token, for ways of pruning prompts and decoding.

    python benchmarks/generated.py MODEL --problems 64 --out benchmarks/results/generated

MODEL is a folder, hub id or GGUF file. Quality: the first problems, greedy, batches of 16 (`decode="step"` does not
depend on the batch; a selection is made for all of it), calibrated on 16 x 512 tokens of Python's documentation,
history frozen. Time: `pp_fx.bench`, one thread, compiled, both sides frozen by Inductor, the decoder blocks of a step
behind a prompt of 128 tokens, interleaved with the dense model. `python docs/measured.py` writes the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from report import STICKY, bars, write_json
from rich.console import Console
from rich.progress import track

import pp_fx
from pp_fx.bench import bench
from pp_fx.measure.humaneval import Solution, read_problems, solve
from pp_fx.measure.paired_interval import paired_interval
from pp_fx.models import load
from pp_fx.text import PYTHON_DOCS, read, sequences

WAYS: dict[str, dict[str, Any]] = {
    "default: prompts 20%, decoding by step, 20%": {"mlp_ratio": 0.2, "decode": "step"},
    "decoding by step, 20%": {"mlp_ratio": 0.0, "decode": "step", "decode_ratio": 0.2},
    "decoding by step, 30%": {"mlp_ratio": 0.0, "decode": "step", "decode_ratio": 0.3},
    "decoding by step, 40%": {"mlp_ratio": 0.0, "decode": "step", "decode_ratio": 0.4},
    "decoding by step, 50%": {"mlp_ratio": 0.0, "decode": "step", "decode_ratio": 0.5},
    "decoding by step, 40%, ranked by int4": {
        "mlp_ratio": 0.0, "decode": "step", "decode_ratio": 0.4, "step_probe": "int4",
    },
    "prompts 20%, decoding dense": {"mlp_ratio": 0.2, "decode": "dense"},
    "prompts 40%, decoding dense": {"mlp_ratio": 0.4, "decode": "dense"},
    "sticky, 20%": {**STICKY, "mlp_ratio": 0.2},
    "sticky, 40%": {**STICKY, "mlp_ratio": 0.4},
}  # fmt: skip


def quality(model: Any, tokenizer: Any, problems: Any, batch: int, config: dict[str, Any], sample: Any) -> Solution:
    """What the model solves, pruned so; it is restored."""
    pp_fx.transform(model, pp_fx.ProbePruningConfig.from_dict(config))
    try:
        if config["mlp_ratio"]:  # nothing else looks at a history
            pp_fx.calibrate(model, sample, progress=False)
        with pp_fx.history_frozen(model):
            return solve(model, tokenizer, problems, batch=batch, new_tokens=256)
    finally:
        pp_fx.restore(model)


def row(dense: Solution, found: Solution) -> dict[str, Any]:
    """Solved, and against the dense answers."""
    pairs = list(zip(dense.solved, found.solved, strict=True))
    return {
        "solved": sum(found.solved),
        "lost": sum(a and not b for a, b in pairs),
        "gained": sum(b and not a for a, b in pairs),
        "interval": list(paired_interval(dense.solved, found.solved)),
        "same_text": sum(a == b for a, b in zip(dense.completions, found.completions, strict=True)),
    }


def times(model: Any, ids: torch.Tensor, config: dict[str, Any], batches: list[int]) -> dict[str, Any]:
    """Batch -> time and bytes of a decode step against dense."""
    made = {}
    for batch in batches:
        settings = pp_fx.ProbePruningConfig.from_dict(config)
        found = bench(model, ids[:batch], settings, phase="decode", new_tokens=48, compiled=True, freezing=True)
        made[str(batch)] = {key: found[key] for key in ("dense_ms", "pruned_ms", "ratio", "ideal")}
        torch.compiler.reset()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--problems", type=int, default=164)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ways", type=int, nargs="*", help="indices of the rows; all")
    parser.add_argument("--time-batches", type=int, nargs="*", default=[1])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/generated"))
    options = parser.parse_args()
    model, tokenizer = load(options.model, torch.bfloat16)
    problems = read_problems(options.problems)
    sample = sequences(read(PYTHON_DOCS), tokenizer, 16, 512)
    dense = solve(model, tokenizer, problems, batch=options.batch, new_tokens=256, progress="dense")
    found: dict[str, Any] = {
        "model": Path(options.model).name,
        "problems": len(problems),
        "batch": options.batch,
        "dense": {"solved": sum(dense.solved)},
        "rows": [],
    }
    names = [name for i, name in enumerate(WAYS) if not options.ways or i in options.ways]
    for name in track(names, "ways", console=Console(stderr=True)):
        solved = row(dense, quality(model, tokenizer, problems, options.batch, WAYS[name], sample))
        found["rows"].append({"name": name, "config": WAYS[name], **solved})
        write_json(options.out.with_suffix(".json"), found)  # what was measured stays if this is stopped
    decoding = [made for made in found["rows"] if made["config"]["decode"] != "dense"]
    for made in track(decoding if options.time_batches else [], "time", console=Console(stderr=True)):
        made["decode"] = times(model, sample[: max(options.time_batches), :128], made["config"], options.time_batches)
        write_json(options.out.with_suffix(".json"), found)
    labels = ["dense", *(made["name"] for made in found["rows"])]
    series = [float(found["dense"]["solved"]), *(float(made["solved"]) for made in found["rows"])]
    title = f"{found['model']}: HumanEval, {len(problems)} problems"
    bars(options.out.with_suffix(".png"), title, "solved", labels, {"solved": series})


if __name__ == "__main__":
    main()
