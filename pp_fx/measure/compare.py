"""`compare`: pruning methods side by side on the same text, calibration and graphs."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calibrate import calibrate
from ..checks import check_integers, check_list
from ..errors import InputError, StateError
from ..methods import METHODS
from ..progress import track
from ..rewrite.layer import is_transformed
from ..rewrite.transform import restore, transform
from ..runtime.modes import history_frozen
from ..shards import check_whole
from .bench import time_prefill
from .evaluate import Evaluation, evaluate
from .macs import count_macs
from .planners import plan_ratios


def compare(
    model: nn.Module,
    ids: Tensor,
    calibration: Tensor,
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    ratios: tuple[float, ...] = (0.2, 0.4),
    attention_ratio: float = 0.0,
    batch: int = 20,
    time_batch: int = 4,
    repeats: int = 3,
    changes: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity, MACs and time of every method at every ratio.

    Args:
        model: an untransformed causal language model in eval mode. It is transformed while this runs and restored.
        ids: int64 [N, T], the evaluation text.
        calibration: int64 [M, T], other text.
        methods: names of `pp_fx.methods.METHODS`.
        ratios: share of MLP channels dropped.
        attention_ratio: share of query heads dropped, in all rows.
        batch: sequences per forward pass; one selection is made per batch.
        time_batch: sequences of the timed forward passes; 0: time is not measured.
        repeats: timed forward passes of each side.
        changes: fields of ProbePruningConfig that hold for all methods, for example `{"round_to": 1}`. Without them
            the rounding is the default's for all, not the 64 of `ProbePruningConfig.paper()`.
        progress: show progress bars on stderr.

    Returns:
        `settings`, `dense` (ppl, nll, seconds) and `rows`, each with `method`, `ratio`, `ppl`, `nll`,
        `nll_above_dense` and its paired standard error over the sequences, `macs` (shares of dense: kept, probe,
        compensation, total), `time_ratio` (pruned / dense, medians of interleaved runs) and `prr`: perplexity lost per
        share of time saved (arXiv 2502.15618, section 4), None where no time is saved.

    Raises:
        InputError: an unknown method or invalid numbers; token ids that cannot be used.
        StateError: the model is transformed.
    """
    check_whole(model, "compare")
    if is_transformed(model):
        raise StateError("model is transformed; call pp_fx.restore(model) first, compare tries several configurations")
    check_list("methods", methods, "('default', 'paper')")
    check_list("ratios", ratios, "(0.2, 0.4)")
    check_integers(1, batch=batch, repeats=repeats)
    check_integers(0, time_batch=time_batch)
    for name in methods:
        if name not in METHODS:
            raise InputError(f"methods={name!r} is unknown; choose of {', '.join(METHODS)}")
    settings = [
        (name, ratio, METHODS[name].config(ratio, attention_ratio, **(changes or {})))
        for name in methods
        for ratio in ratios
    ]
    dense = evaluate(model, ids, batch, progress="dense" if progress else None)
    twin = copy.deepcopy(model) if time_batch else None
    rows = []
    for name, ratio, config in track(settings, "compare", progress):
        config = plan_ratios(name, model, config, calibration)
        transform(model, config)
        try:
            calibrate(model, calibration, progress=False)
            found = evaluate(model, ids, batch)
            macs = count_macs(model, min(batch, len(ids)), ids.shape[1])
            time_ratio = None
            if twin is not None:
                with history_frozen(model), torch.no_grad():
                    time_ratio = time_prefill(twin, model, ids[:time_batch], repeats)
        finally:
            restore(model)
        rows.append({"method": name, "ratio": ratio, **_row(found, dense, time_ratio), "macs": _shares(macs)})
    shapes = {"sequences": list(ids.shape), "calibration": list(calibration.shape)}
    given = {"batch": batch, "attention_ratio": attention_ratio, "time_batch": time_batch, "repeats": repeats}
    return {"settings": {**shapes, **given, "changes": changes or {}}, "dense": dense.to_dict(), "rows": rows}


def _row(found: Evaluation, dense: Evaluation, time_ratio: float | None) -> dict[str, Any]:
    saves = time_ratio is not None and time_ratio < 1
    return {
        "ppl": found.ppl,
        "nll": found.nll,
        "nll_above_dense": found.nll - dense.nll,
        "nll_stderr": found.stderr_vs(dense) if len(found.per_sequence) > 1 else None,
        "time_ratio": time_ratio,
        "prr": (found.ppl - dense.ppl) / (1 - time_ratio) if saves else None,  # type: ignore[operator]
        "per_sequence": found.per_sequence.tolist(),
    }


def _shares(macs: Any) -> dict[str, float]:
    total = (macs.pruned + macs.overhead) / macs.dense
    parts = {"kept": macs.pruned, "probe": macs.probe, "compensation": macs.compensation}
    return {**{k: v / macs.dense for k, v in parts.items()}, "total": total}


def table(result: dict[str, Any], title: str) -> Any:
    """A rich table of what `compare` returns, best perplexity first within a ratio."""
    from rich.table import Table

    out = Table(title=f"{title}: dense {result['dense']['ppl']:.2f}")
    for column in ("method", "ratio", "perplexity", "nll above dense", "MACs", "time", "PRR"):
        out.add_column(column, justify="left" if column == "method" else "right")
    for row in sorted(result["rows"], key=lambda r: (r["ratio"], r["ppl"])):
        error = "" if row["nll_stderr"] is None else f" ± {row['nll_stderr']:.3f}"
        out.add_row(
            row["method"],
            f"{row['ratio']:.0%}",
            f"{row['ppl']:.2f}",
            f"{row['nll_above_dense']:.3f}{error}",
            f"{row['macs']['total']:.1%}",
            "-" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}",
            "-" if row["prr"] is None else f"{row['prr']:.0f}",
        )
    return out


def require_matplotlib() -> None:
    """Ask before the long work, not after it.

    Raises:
        InputError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("a plot needs matplotlib; run: pip install 'pp-fx[report]'")


def plot(result: dict[str, Any], title: str, file: Path) -> None:
    """Perplexity (log scale) against total MACs, one line a method.

    Raises:
        InputError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(r["method"] for r in result["rows"]):
        rows = sorted((r for r in result["rows"] if r["method"] == name), key=lambda r: r["macs"]["total"])
        axes.plot([r["macs"]["total"] for r in rows], [r["ppl"] for r in rows], marker="o", label=name)
    axes.axhline(result["dense"]["ppl"], color="gray", linestyle="--", label="dense")
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:g}")
    axes.set_xlabel("block MACs, probe and compensation included (dense = 1)")
    axes.set_ylabel("perplexity")
    axes.set_title(title)
    figure.legend(frameon=False, loc="outside right center")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
