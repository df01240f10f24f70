"""The HTML of a report: one file, pictures inside, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

_STYLE = """
:root { --ink: #1d2733; --soft: #5a6b7d; --line: #dde4eb; --blue: #1f6feb; }
* { box-sizing: border-box; }
body { font: 16px/1.6 system-ui, sans-serif; color: var(--ink); background: #f5f7fa; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.2rem 4rem; }
h1 { margin: 0 0 .2rem; font-size: 1.9rem; } h2 { margin: 0 0 .4rem; font-size: 1.2rem; }
p { margin: .2rem 0 .8rem; color: var(--soft); }
section, .card { background: white; border: 1px solid var(--line); border-radius: 10px; }
section { padding: 1.3rem 1.5rem; margin-top: 1.2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; margin-top: 1.2rem; }
.card { padding: .9rem 1.1rem; }
.card b { display: block; font-size: 1.6rem; color: var(--blue); line-height: 1.2; }
.card span { color: var(--soft); font-size: .85rem; }
img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
"""


def page(found: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The page.

    Args:
        found: what `report` has measured.
        pictures: name -> PNG.
    """
    title = escape(found["title"])
    tokens = f"{found['batch']} x {found['length']} tokens a batch, {len(found['kept'])} batches"
    sections = [
        ("Quality against time", "Perplexity (log scale) of every method at every ratio, against the time of its "
         "decoder blocks, uncompiled. Lower and further left is better.", _image(pictures, "quality") + _table(found)),
        ("What the batches keep", "Each row is a layer: in how many batches each of its MLP channels runs. Yellow: in "
         "all; dark: in none; between: the batch decides, which no static method can.", _image(pictures, "kept")),
        ("How stable the selection is", "Mean share of kept units that two batches have in common.",
         _image(pictures, "stability")),
        ("MACs of every layer", "What is kept, and what deciding costs.", _image(pictures, "macs")),
        ("Where the time goes", "An uncompiled pruned call, by part.", _image(pictures, "shares")),
    ]  # fmt: skip
    body = "\n".join(f"<section><h2>{name}</h2><p>{text}</p>{content}</section>" for name, text, content in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}, pruned</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><main><h1>{title}</h1><p>Probe pruning, {tokens}.</p>{_cards(found)}\n{body}</main></body></html>\n"
    )


def _cards(found: dict[str, Any]) -> str:
    rows = found["comparison"]["rows"]
    most = max(row["ratio"] for row in rows)
    best = min((row for row in rows if row["ratio"] == most), key=lambda row: row["ppl"])
    cards = [
        (f"{found['comparison']['dense']['ppl']:.2f}", "perplexity, dense"),
        (f"{best['ppl']:.2f}", f"perplexity, {escape(best['method'])} at {most:.0%}"),
        (f"{best['macs']['total']:.0%}", "of the block MACs, all counted"),
    ]
    if best["time_ratio"] is not None:
        cards.append((f"{best['time_ratio']:.2f}", "time of the blocks, dense = 1"))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{v}</b><span>{k}</span></div>' for v, k in cards)
        + "</div>"
    )


def _table(found: dict[str, Any]) -> str:
    head = ("method", "ratio", "perplexity", "NLL above dense", "block MACs", "probe", "time", "PRR")
    lines = [f"<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>"]
    for row in sorted(found["comparison"]["rows"], key=lambda r: (r["ratio"], r["ppl"])):
        error = "" if row["nll_stderr"] is None else f" ± {row['nll_stderr']:.3f}"
        cells = (
            escape(row["method"]), f"{row['ratio']:.0%}", f"{row['ppl']:.2f}", f"{row['nll_above_dense']:.3f}{error}",
            f"{row['macs']['total']:.1%}", f"{row['macs']['probe']:.1%}",
            "" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}",
            "" if row["prr"] is None else f"{row['prr']:.0f}",
        )  # fmt: skip
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(lines)}</table><p>PRR: perplexity lost per share of time saved; lower is better.</p>"


def _image(pictures: dict[str, bytes], name: str) -> str:
    data = base64.b64encode(pictures[name]).decode()
    return f'<img alt="{name}" src="data:image/png;base64,{data}">'
