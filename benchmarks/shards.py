"""What it costs that every shard of a tensor parallel model keeps equally many channels: perplexity, in one process.

    python benchmarks/shards.py MODEL --text-dir wikitext-2 --out benchmarks/results/shards

MODEL is a folder, hub id or "smollm2"; the folder holds test.txt and valid.txt of WikiText-2. The channels of every MLP
are cut into equal, contiguous shards, as tensor parallelism does. "choice": each shard keeps its own best, in place of
the best of all; "choice and compensation": least squares within each shard, too, with as many principal directions of
each as ranks have. Perplexity: 8 x 512 tokens of the test text as one batch, calibrated on 32 x 512 of the other,
history frozen. A model's rows replace those that the file has of it. `python docs/measured.py` writes the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from report import processor, write_json
from rich.console import Console
from rich.progress import track
from torch import Tensor

import pp_fx
from pp_fx.calibration.directions import principal
from pp_fx.evaluate import evaluate
from pp_fx.methods import Compensation
from pp_fx.models import load
from pp_fx.runtime import compensate, select
from pp_fx.runtime.state import GroupState, states_of
from pp_fx.text import read, sequences

SHARDS = (2, 4, 8)
RANK = pp_fx.ProbePruningConfig().compensation_rank


def directions_of(state: GroupState, wide: Tensor, span: slice) -> Tensor:
    """The principal directions bf16 [RANK, c] of some channels, of those of all [RANK * the most shards, C]."""
    assert state.energy is not None
    assert state.mean is not None
    variance = (state.energy - state.mean.square()).clamp(min=0)[span]
    return principal(wide[:, span].float(), variance, RANK).to(wide.dtype)


@contextlib.contextmanager
def in_shards(count: int, apart: bool, wide: dict[Any, Tensor]) -> Iterator[None]:
    """Inside, every MLP's channels are chosen in `count` shards; `apart`: and compensated in them."""
    top, compensation = select.top, compensate._compensation

    def choose(scores: Tensor, kept: int, exports: bool) -> Tensor:
        best = [top(part, -(-kept // count), exports) for part in scores.chunk(count)]
        return torch.cat([one + i * (len(scores) // count) for i, one in enumerate(best)])

    def stand_in(state: Any, selection: Any, z: Any, rows: Any, weight: Tensor, plan: Any) -> Compensation:
        width, made = weight.shape[1] // count, []
        for i in range(count):
            span = slice(i * width, (i + 1) * width)
            columns = (
                selection.columns[(selection.columns >= span.start) & (selection.columns < span.stop)] - span.start
            )
            cut = {name: None if (t := getattr(state, name)) is None else t[..., span] for name in ("energy", "mean")}
            cut["directions"] = directions_of(state, wide[state], span)
            kept = {"compensation": state.compensation, "seen": state.seen, "calibrated": state.calibrated}
            shard = SimpleNamespace(**cut, **kept), SimpleNamespace(columns=columns)
            made.append(compensation(*shard, None if z is None else z[..., span], rows, weight[:, span], plan))
        corrections = [one.dense_correction() for one in made]
        whole = None if corrections[0] is None else (torch.cat(corrections),)  # type: ignore[arg-type]
        return Compensation(sum(one.vector for one in made), whole)  # type: ignore[arg-type]

    select.top = choose
    compensate._compensation = stand_in if apart else compensation  # type: ignore[assignment]
    try:
        yield
    finally:
        select.top, compensate._compensation = top, compensation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text-dir", type=Path, required=True, help="folder with test.txt and valid.txt")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--name", help="of the model in the table")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shards"))
    options = parser.parse_args()
    name, file = options.name or Path(options.model).name, options.out.with_suffix(".json")
    known = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    rows = [row for row in known if row["model"] != name]
    model, tokenizer = load(options.model, torch.bfloat16)
    test = sequences(read(str(options.text_dir / "test.txt")), tokenizer, 8, 512)
    sample = sequences(read(str(options.text_dir / "valid.txt")), tokenizer, 32, 512)
    dense = evaluate(model, test, len(test), progress="dense")
    for ratio in track(options.ratios, "ratios", console=Console(stderr=True)):
        config = pp_fx.ProbePruningConfig(mlp_ratio=ratio, round_to=1, compensation_rank=RANK * max(SHARDS))
        pp_fx.transform(model, config)
        pp_fx.calibrate(model, sample)
        wide: dict[Any, Tensor] = {s: s.directions for s in states_of(model) if s.directions is not None}
        for state, directions in wide.items():
            state.directions = directions_of(state, directions, slice(None))
        with pp_fx.history_frozen(model):
            one = evaluate(model, test, len(test))
            common = {"model": name, "mlp_ratio": ratio, "dense_ppl": dense.ppl, "processor": processor()}
            rows.append(
                {**common, "shards": 1, "choice": {"ppl": one.ppl}, "choice and compensation": {"ppl": one.ppl}}
            )
            for count in SHARDS:
                row: dict[str, Any] = {**common, "shards": count}
                for key, apart in (("choice", False), ("choice and compensation", True)):
                    with in_shards(count, apart, wide):
                        found = evaluate(model, test, len(test))
                    above = {"nll_above_one": found.nll - one.nll, "nll_stderr": found.stderr_vs(one)}
                    row[key] = {"ppl": found.ppl, "cost": found.ppl / one.ppl - 1, **above}
                rows.append(row)
        pp_fx.restore(model)
        write_json(file, {"rows": rows})
    _plot(options.out.with_suffix(".png"), rows)


def _plot(file: Path, rows: list[dict[str, Any]]) -> None:
    """How far perplexity rises above one choice among all channels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for name, ratio in dict.fromkeys((row["model"], row["mlp_ratio"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["mlp_ratio"]) == (name, ratio)]
        counts = [str(row["shards"]) for row in mine]
        line = None
        for key, style in (("choice", "--"), ("choice and compensation", "-")):
            costs = [100 * row[key].get("cost", 0.0) for row in mine]
            color = None if line is None else line.get_color()
            (line,) = axes.plot(counts, costs, style, marker="o", color=color, label=f"{name}, MLP {ratio:.0%}, {key}")
    axes.set_xlabel("shards")
    axes.set_ylabel("perplexity above one choice, %")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
