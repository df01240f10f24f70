"""`compare_task`: pruning methods and ways of decoding side by side on a generated task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..calibration.calibrate import calibrate
from ..checks import check_integers, check_list
from ..config import ProbePruningConfig
from ..errors import ConfigError, InputError, StateError
from ..methods import METHODS
from ..progress import track
from ..rewrite.layer import is_transformed
from ..rewrite.transform import restore, transform
from ..runtime.modes import history_frozen
from ..shards import check_whole
from .compare import require_matplotlib
from .humaneval import Problem, solve
from .paired_interval import paired_interval
from .planners import plan_ratios
from .run_task import TASKS, answers, settings_of, task_versions


def compare_task(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    calibration: Tensor,
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    ratios: tuple[float, ...] = (0.2, 0.4),
    decodes: tuple[str, ...] = ("sticky",),
    decode_ratio: float | None = None,
    attention_ratio: float = 0.0,
    batch: int = 20,
    new_tokens: int = 256,
    changes: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """What every method solves at every ratio with every way of decoding.

    Args:
        model: an untransformed causal language model in eval mode. It is transformed while this runs and restored.
        tokenizer: its tokenizer.
        problems: of `pp_fx.measure.humaneval.read_problems`.
        calibration: int64 [M, T], text; the history that it leaves is frozen while a model generates.
        methods: names of `pp_fx.methods.METHODS`.
        ratios: share of MLP channels dropped.
        decodes: values of ProbePruningConfig.decode.
        decode_ratio: of the rows that decode by "step" or "auto"; None: each row's own ratio.
        attention_ratio: share of query heads dropped, in all rows.
        batch: problems per call of `generate`; one selection is made per batch.
        new_tokens: generated for a problem, at most.
        changes: fields of ProbePruningConfig that hold for all methods.
        progress: show progress bars on stderr.

    Returns:
        `task`, `problems`, `settings`, `dense` (solved, seconds, solved_ids), `versions` and `rows`, each with
        `method`, `ratio`, `decode`, the three of dense, `interval` (`paired_interval`, in problems) and `time_ratio`
        (seconds / dense seconds, one run of each).

    Raises:
        InputError: an unknown method, invalid numbers, or a method that cannot decode in one of these ways.
        StateError: the model is transformed.
    """
    check_whole(model, "compare_task")
    if is_transformed(model):
        raise StateError("model is transformed; call pp_fx.restore(model) first, compare tries several configurations")
    check_integers(1, batch=batch, new_tokens=new_tokens)
    asked = rows_asked(methods, ratios, decodes, decode_ratio, attention_ratio, changes or {})
    given: dict[str, Any] = {"batch": batch, "new_tokens": new_tokens}
    dense = solve(model, tokenizer, problems, **given, progress="dense" if progress else None)
    rows, planned = [], {}
    for name, ratio, config in track(asked, "compare", progress):
        if (name, ratio) not in planned:  # whichever way of decoding comes first
            planned[name, ratio] = plan_ratios(name, model, config, calibration)
        transform(
            model, dataclasses.replace(planned[name, ratio], decode=config.decode, decode_ratio=config.decode_ratio)
        )
        try:
            calibrate(model, calibration, progress=False)
            with history_frozen(model):
                found = solve(model, tokenizer, problems, **given)
        finally:
            restore(model)
        row = {"method": name, "ratio": ratio, "decode": config.decode, **answers(found, problems)}
        interval = list(paired_interval(dense.solved, found.solved))
        rows.append({**row, "interval": interval, "time_ratio": found.seconds / dense.seconds})
    return {
        "task": TASKS[0],
        "problems": len(problems),
        "settings": {
            **settings_of(batch, new_tokens, calibration),
            "attention_ratio": attention_ratio,
            "changes": changes or {},
        },
        "dense": answers(dense, problems),
        "rows": rows,
        "versions": task_versions(),
    }


def rows_asked(
    methods: tuple[str, ...],
    ratios: tuple[float, ...],
    decodes: tuple[str, ...],
    decode_ratio: float | None,
    attention_ratio: float,
    changes: dict[str, Any],
) -> list[tuple[str, float, ProbePruningConfig]]:
    """Method, ratio and configuration of every row.

    Raises:
        InputError: an unknown method, or one that cannot decode in one of these ways.
        ConfigError: a ratio is out of range.
    """
    check_list("methods", methods, "('default', 'paper')")
    check_list("ratios", ratios, "(0.2, 0.4)")
    check_list("decodes", decodes, "('sticky', 'dense')")
    rows = []
    for name in methods:
        if name not in METHODS:
            raise InputError(f"methods={name!r} is unknown; choose of {', '.join(METHODS)}")
        for ratio in ratios:
            config = METHODS[name].config(ratio, attention_ratio, **changes)
            for decode in decodes:
                try:
                    own = decode_ratio if decode in ("step", "auto") else None
                    decoding: Any = {"decode": decode, "decode_ratio": own}
                    rows.append((name, ratio, dataclasses.replace(config, **decoding)))
                except ConfigError as error:
                    raise InputError(
                        f"decodes={decode!r} does not go with methods={name!r} ({error}); leave one of them out"
                    ) from None
    return rows


def table(result: dict[str, Any], title: str) -> Any:
    """A rich table of what `compare_task` returns, most solved first within a ratio."""
    from rich.table import Table

    dense = result["dense"]
    out = Table(title=f"{title}: dense {dense['solved']} of {result['problems']} in {dense['seconds']:.0f} s")
    for column in ("method", "ratio", "decode", "solved", "above dense (95%)", "time"):
        out.add_column(column, justify="left" if column in ("method", "decode") else "right")
    for row in sorted(result["rows"], key=lambda r: (r["ratio"], -r["solved"])):
        low, high = row["interval"]
        out.add_row(
            row["method"],
            f"{row['ratio']:.0%}",
            row["decode"],
            str(row["solved"]),
            f"{low:+.1f} to {high:+.1f}",
            f"{row['time_ratio']:.2f}",
        )
    return out


def plot(result: dict[str, Any], title: str, file: Path) -> None:
    """Problems solved against seconds, one line a method and way of decoding.

    Raises:
        InputError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, decode in dict.fromkeys((r["method"], r["decode"]) for r in result["rows"]):
        rows = [r for r in result["rows"] if (r["method"], r["decode"]) == (name, decode)]
        rows.sort(key=lambda r: r["ratio"])
        times, solved = [r["time_ratio"] for r in rows], [r["solved"] for r in rows]
        axes.plot(times, solved, marker="o", label=f"{name}, {decode}")
    axes.plot([1], [result["dense"]["solved"]], marker="o", color="gray", linestyle="", label="dense")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds of generation (dense = 1)")
    axes.set_ylabel(f"solved of {result['problems']}")
    axes.set_title(title)
    figure.legend(frameon=False, loc="outside right center")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
