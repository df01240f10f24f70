"""What the benchmarks share: a configuration, the machine's name, JSON, a plot of bars."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from pp_fx.requirements import versions

STICKY: dict[str, Any] = {
    "skip_layers": 3,
    "decode": "sticky",
    "guard": False,
    "probe": {"ranking": "residual", "first_position": "always"},
}
"""One selection for a generation, in all layers but the first three, calls of every size pruned: what the tables call
sticky."""


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = set(next(x for x in lines if x.startswith("flags")).split())
    flags = {"avx512_bf16", "amx_bf16", "avx512f"} & known or {"avx2"} & known
    return next(x.split(":")[1].strip() for x in lines if x.startswith("model name")) + f" ({', '.join(sorted(flags))})"


def commit() -> str:
    """The checkout's commit, with a + where files differ from it; empty outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_json(file: Path, document: dict[str, Any]) -> None:
    """Indented JSON with the processor and the versions that the figures depend on; folders made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noted = {**versions(), "commit": commit(), **document.get("versions", {})}
    document = {**document, "processor": processor(), "versions": noted}
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def bars(
    file: Path, title: str, ylabel: str, rows: list[str], series: dict[str, list[float]], log: bool = False
) -> None:
    """Horizontal groups of bars, one group a row, with their values."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.6), layout="constrained")
    height, colors = 0.8 / len(series), ("#2a6f97", "#a9c5d6")
    for index, (label, values) in enumerate(series.items()):
        places = [i + (index - (len(series) - 1) / 2) * height for i in range(len(rows))]
        drawn = axes.barh(places, values, height, label=label, color=colors[index % len(colors)])
        axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel(ylabel)
    axes.set_title(title)
    axes.margins(x=0.12)
    if len(series) > 1:
        figure.legend(frameon=False, loc="outside lower center", ncols=len(series))
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
