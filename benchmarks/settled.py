"""How many channels are settled, kept by every batch or by none, and what fixing them by history costs and saves.

A history calibrated on one text; batches of 1 x 512 of this text and of Python's documentation choose. Then the share
of channels that keep their place, whether both texts settle the same ones, and perplexity where the most settled
channels are fixed and the probe chooses among the others alone (its compensation still sees all of them). The time is
an upper bound: of a layer of Llama-2-7B's shapes, what probing and copying the settled channels takes.

    python benchmarks/settled.py --text test.txt --calibration valid.txt --models smollm2,path/to/qwen
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pp_fx
from pp_fx.evaluate import evaluate
from pp_fx.kernels import few_rows
from pp_fx.kernels.kept_columns import copy_columns
from pp_fx.models import load
from pp_fx.runtime import select
from pp_fx.runtime.state import states_of
from pp_fx.text import PYTHON_DOCS, read, sequences

SHARES, LENGTH = (0.5, 0.7, 0.9), 512
HIDDEN, CHANNELS, ROWS, DROPPED = 4096, 11008, 13, 0.4
"""Of the layer that is timed, and the probe's rows of 512 tokens."""


class Choices:
    """Stands in for the top-k of every layer's scores: counts what is kept, and fixes what it is told.

    Attributes:
        kept: fp32 [layers, C], how often each channel was kept.
        fixed: fp32 [layers, C], added to the scores: infinity for what is always kept, its negative for what never is.
    """

    def __init__(self, states: list[Any]) -> None:
        self.kept = torch.zeros(len(states), states[0].units)
        self.fixed: Tensor | None = None
        self._top, self._calls = select.top, 0

    def __call__(self, scores: Tensor, count: int, exports: bool) -> Tensor:
        layer = self._calls % len(self.kept)
        self._calls += 1
        kept = self._top(scores if self.fixed is None else scores + self.fixed[layer], count, exports)
        self.kept[layer, kept] += 1
        return kept


@contextmanager
def choices(model: Any) -> Iterator[Choices]:
    """Inside, every layer's choice goes through it; the history is frozen."""
    made = Choices([s for s in states_of(model) if s.prunes])
    select.top = made
    try:
        with pp_fx.history_frozen(model):
            yield made
    finally:
        select.top = made._top


def frequencies(model: Any, ids: Tensor) -> Tensor:
    """Share of the batches [1, T] of ids [N, T] that keep each channel: fp32 [layers, C]."""
    with choices(model) as made, torch.no_grad():
        for row in ids:
            model(row[None], use_cache=False, logits_to_keep=1)
        return made.kept / len(ids)


def fixed_scores(model: Any, often: Tensor, share: float) -> Tensor:
    """For `Choices.fixed`: so large a share of the kept and of the dropped channels is fixed, the surest first."""
    fixed = torch.zeros_like(often)
    for layer, state in enumerate(s for s in states_of(model) if s.prunes):
        sure = often[layer] + 1e-6 * select.history_scores(state).argsort().argsort() / state.units
        order = sure.argsort(descending=True)
        fixed[layer, order[: round(share * state.kept_units)]] = torch.inf
        dropped = round(share * (state.units - state.kept_units))
        fixed[layer, order[state.units - dropped :]] = -torch.inf
    return fixed


def settled(often: Tensor) -> tuple[Tensor, Tensor]:
    """Which channels at least 99% and at most 1% of the batches keep."""
    return often >= 0.99, often <= 0.01


def measure(name: str, ratio: float, texts: dict[str, Any], options: Any) -> dict[str, Any]:
    """One model at one ratio."""
    chosen, scoring = options.batches, options.scored
    model, tokenizer = load(name, torch.bfloat16)
    ids = {text: sequences(read(where), tokenizer, chosen, LENGTH, skip) for text, (where, skip, _) in texts.items()}
    scored = {
        text: sequences(read(where), tokenizer, scoring, LENGTH, last) for text, (where, _, last) in texts.items()
    }
    dense = {text: evaluate(model, part, 1, progress=f"dense, {text}") for text, part in scored.items()}
    pp_fx.transform(model, {"skip_layers": 3, "mlp_ratio": ratio, "guard": False})
    pp_fx.calibrate(model, sequences(read(options.calibration), tokenizer, options.calibrated, LENGTH))
    often = {text: frequencies(model, part) for text, part in ids.items()}
    first, second = (settled(one) for one in often.values())
    row: dict[str, Any] = {"model": Path(name).name, "mlp_ratio": ratio, "batches": chosen, "scored": scoring}
    for text, (always, never) in zip(texts, (first, second), strict=True):
        row[text] = {"always": always.float().mean().item(), "never": never.float().mean().item()}
        row[text] |= {"dense_ppl": dense[text].ppl}
    row["agreement"] = {
        name: (a & b).sum().item() / a.sum().item()
        for name, a, b in zip(("always", "never"), first, second, strict=True)
    }
    own = next(iter(often.values()))
    for text, part in scored.items():
        with choices(model) as made:
            today = evaluate(model, part, 1, progress=f"today, {text}")
            row[text] |= {"ppl": today.ppl, "fixed": []}
            for share in SHARES:
                made.fixed = fixed_scores(model, own, share)
                found = evaluate(model, part, 1, progress=f"{share:.0%} fixed, {text}")
                change = {"change": found.ppl / today.ppl - 1, "nll_stderr": found.stderr_vs(today)}
                row[text]["fixed"].append({"share": share, "ppl": found.ppl, **change})
    return row


def milliseconds(runs: dict[str, Callable[[], Any]], repeats: int = 15) -> dict[str, float]:
    """Least CPU time of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            times[name].append(1000 * (time.thread_time() - start))
    return {name: min(found) for name, found in times.items()}


@torch.no_grad()
def time_layer() -> dict[str, Any]:
    """What the probe and the copies of a layer take at 1 x 512, whole, beside its dense projections."""
    gate = torch.randn(CHANNELS, HIDDEN, dtype=torch.bfloat16)
    down, square = torch.randn(HIDDEN, CHANNELS, dtype=torch.bfloat16), gate[:HIDDEN].clone()
    rows, x = torch.randn(ROWS, HIDDEN, dtype=torch.bfloat16), torch.randn(LENGTH, HIDDEN, dtype=torch.bfloat16)
    z = torch.randn(LENGTH, CHANNELS, dtype=torch.bfloat16)
    kept = torch.randperm(CHANNELS)[: round(CHANNELS * (1 - DROPPED))].sort().values
    held, columns = torch.empty(len(kept), HIDDEN, dtype=gate.dtype), torch.empty(HIDDEN, len(kept), dtype=gate.dtype)
    found = milliseconds({
        "input": lambda: F.linear(x, gate),
        "output": lambda: F.linear(z, down),
        "attention": lambda: F.linear(x, square),
        "probe": lambda: few_rows(rows, gate),
        "rows": lambda: torch.index_select(gate, 0, kept, out=held),
        "columns": lambda: copy_columns(down, kept, columns),
    })  # fmt: skip
    dense = 2 * found["input"] + found["output"] + 4 * found["attention"]
    probe, copies = 2 * found["probe"], 2 * found["rows"] + found["columns"]
    saved = [{"share": share, "saved": share * (probe + copies) / dense} for share in SHARES]
    return {"dense_ms": dense, "probe_ms": probe, "copies_ms": copies, "saved": saved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--models", default="smollm2", help="folders, GGUF files or smollm2, separated by commas")
    parser.add_argument("--ratios", default="0.2,0.4", help="of MLPs, separated by commas")
    parser.add_argument("--batches", type=int, default=60, help="of each text that choose")
    parser.add_argument("--scored", type=int, default=20, help="batches of each text for perplexity")
    parser.add_argument("--calibrated", type=int, default=64, help="sequences of the history")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/settled"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    # where each text is, and how many sequences are skipped before those that choose and those that are scored
    texts = {"same text": (options.text, 0, options.batches), "other text": (PYTHON_DOCS, 0, 100)}
    document: dict[str, Any] = {"layer": time_layer(), "rows": []}
    for name in options.models.split(","):
        for ratio in map(float, options.ratios.split(",")):
            document["rows"].append(measure(name, ratio, texts, options))
            write_json(options.out.with_suffix(".json"), document)  # what was measured stays if this is stopped
    table = Table("model", "MLP", "text", "always", "never", "today", *(f"{share:.0%} fixed" for share in SHARES))
    for row in document["rows"]:
        for text in texts:
            one = row[text]
            cells = [f"{one['always']:.1%}", f"{one['never']:.1%}", f"{one['ppl']:.2f}"]
            table.add_row(
                row["model"], f"{row['mlp_ratio']:.0%}", text, *cells, *(f"{f['change']:+.2%}" for f in one["fixed"])
            )
    Console().print(table, document["layer"])


if __name__ == "__main__":
    main()
