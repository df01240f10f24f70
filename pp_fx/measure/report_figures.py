"""The pictures of a report, as PNG bytes. Every function takes what `report` has found."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

_BLUE, _ORANGE, _GREEN, _GRAY = "#1f6feb", "#e8590c", "#2b8a3e", "#8a97a6"
_COLORS = (_BLUE, _ORANGE, _GREEN, "#9c36b5", "#c92a2a", "#0b7285", "#5f3dc4", "#868e96")


def figures(found: dict[str, Any]) -> dict[str, bytes]:
    """Name -> PNG."""
    with pyplot.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        return {
            "quality": _quality(found["comparison"]),
            "kept": _kept(found),
            "stability": _stability(found),
            "macs": _macs(found["layers"]),
            "shares": _shares(found["shares"]),
        }


def _quality(comparison: dict[str, Any]) -> bytes:
    """Perplexity against the time of the blocks."""
    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    timed = all(row["time_ratio"] is not None for row in comparison["rows"])
    dense = comparison["dense"]["ppl"]
    for color, name in zip(_COLORS * 9, dict.fromkeys(r["method"] for r in comparison["rows"]), strict=False):
        rows = sorted((r for r in comparison["rows"] if r["method"] == name), key=lambda r: r["ratio"])
        x = [1.0, *(r["time_ratio"] if timed else r["macs"]["total"] for r in rows)]
        axes.plot(x, [dense, *(r["ppl"] for r in rows)], color=color, marker="o", label=name)
        for place, row in zip(x[1:], rows, strict=True):
            axes.annotate(f"{row['ratio']:.0%}", (place, row["ppl"]), xytext=(5, 4), textcoords="offset points", size=8)
    axes.axhline(dense, color=_GRAY, linestyle="--", linewidth=1)
    axes.text(0.01, dense, "dense", color=_GRAY, va="bottom", transform=axes.get_yaxis_transform())
    axes.set_yscale("log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.set_xlabel("time of the decoder blocks, dense = 1" if timed else "block MACs in all, dense = 1")
    axes.set_ylabel("perplexity")
    axes.legend(frameon=False)
    return _png(figure)


def _kept(found: dict[str, Any]) -> bytes:
    """In how many batches each channel is kept; a layer's channels are sorted by it."""
    names = [name for name in found["kept"][0] if name.endswith(".mlp")]
    batches = len(found["kept"])
    rows = []
    for name in names:
        index = int(name.split(".")[0])
        counts = np.zeros(found["units"][index]["mlp"])
        for kept in found["kept"]:
            counts[kept[name]] += 1
        rows.append(np.interp(np.linspace(0, 1, 400), np.linspace(0, 1, len(counts)), np.sort(counts)[::-1] / batches))
    figure, axes = pyplot.subplots(figsize=(8, 0.16 * len(rows) + 1.6), layout="constrained")
    drawn = axes.imshow(np.array(rows) if rows else np.zeros((1, 1)), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(0, len(names), max(1, len(names) // 10)))
    axes.set_yticklabels([names[i].split(".")[0] for i in axes.get_yticks()])
    axes.set_xticks([0, 100, 200, 300, 399], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("channels of the layer, most often kept first")
    axes.set_ylabel("layer")
    figure.colorbar(drawn, label="share of the batches that keep it")
    return _png(figure)


def overlap(found: dict[str, Any]) -> dict[str, float]:
    """Group -> mean share of kept units that two batches have in common."""
    result = {}
    for name in found["kept"][0]:
        sets = [set(kept[name]) for kept in found["kept"]]
        pairs = [len(a & b) / len(a) for i, a in enumerate(sets) for b in sets[i + 1 :]]
        result[name] = sum(pairs) / len(pairs)
    return result


def _stability(found: dict[str, Any]) -> bytes:
    """What two batches have in common, against what chance would give."""
    figure, axes = pyplot.subplots(figsize=(8, 3.4), layout="constrained")
    for color, kind in ((_BLUE, "mlp"), (_ORANGE, "attention")):
        shared = {int(n.split(".")[0]): v for n, v in overlap(found).items() if n.endswith(kind)}
        if shared:
            chance = [len(found["kept"][0][f"{i}.{kind}"]) / found["units"][i][kind] for i in shared]
            axes.plot(list(shared), list(shared.values()), color=color, marker="o", markersize=4, label=kind)
            axes.plot(list(shared), chance, color=color, linestyle=":", label=f"{kind}, by chance")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_xlabel("layer")
    axes.set_ylabel("kept units in common")
    axes.legend(frameon=False, ncols=2)
    return _png(figure)


def _macs(layers: list[dict[str, Any]]) -> bytes:
    """Every layer's MACs: kept, probe, compensation, dropped."""
    figure, axes = pyplot.subplots(figsize=(8, 3.4), layout="constrained")
    below = np.zeros(len(layers))
    dense = np.array([layer["macs"]["dense"] for layer in layers])
    parts = (("kept", "pruned", _BLUE), ("probe", "probe", _ORANGE), ("compensation", "compensation", _GREEN))
    for label, key, color in parts:
        values = np.array([layer["macs"][key] for layer in layers]) / dense
        axes.bar(range(len(layers)), values, bottom=below, color=color, label=label, width=0.85)
        below += values
    axes.axhline(1, color=_GRAY, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.25)
    axes.set_xlabel("layer")
    axes.set_ylabel("MACs, dense = 1")
    axes.legend(frameon=False, ncols=3, loc="upper right")
    return _png(figure)


def _shares(shares: dict[str, float]) -> bytes:
    """Where the time of an uncompiled pruned call goes."""
    figure, axes = pyplot.subplots(figsize=(8, 1.7), layout="constrained")
    parts = {**shares, "products, attention, norms": 1 - sum(shares.values())}
    left = 0.0
    for color, (name, share) in zip(_COLORS, parts.items(), strict=False):
        axes.barh(0, share, left=left, color=color, label=f"{name} {share:.1%}")
        left += share
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.spines["left"].set_visible(False)
    figure.legend(frameon=False, ncols=3, loc="outside lower center", fontsize=9)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    pyplot.close(figure)
    return buffer.getvalue()
