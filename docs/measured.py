"""Write the tables of docs/measured.md and of the README from benchmarks/results/*.json.

    python docs/measured.py

Nothing is measured here. A table stands between two comments with the name of its file, `<!-- cpu -->` and
`<!-- /cpu -->`; what stands around them is text like any other.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGES = ROOT / "benchmarks" / "results", (ROOT / "README.md", ROOT / "docs" / "measured.md")
sys.path.insert(0, str(ROOT / "benchmarks"))

from suite import label  # noqa: E402
from suite import table as suite_table  # noqa: E402

SHAPE = "{settings[phase]} {settings[batch]} x {settings[length]}"
"""Of a result of `pp_fx.bench`."""


def grid(rows: Iterable[dict[str, Any]], columns: dict[str, str]) -> str:
    """Markdown: column titles, each with a template of its cells; what a row lacks is left empty.

    Raises:
        KeyError: no row has anything for a column: the file calls it otherwise.
    """
    cells = [[cell(template, row) for template in columns.values()] for row in rows]
    empty = [title for title, *column in zip(columns, *cells, strict=True) if not any(column)]
    if empty:
        raise KeyError(", ".join(empty))
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in cells)]) + "\n"


def cell(template: str, row: dict[str, Any]) -> str:
    """One value; empty if it was not measured (None takes no format)."""
    try:
        return template.format_map(row)
    except (KeyError, TypeError):
        return ""


def headline(found: dict[str, Any]) -> str:
    """The README's table: one row a ratio, one column a shape."""
    rows = {float(ratio): {"name": f"MLP {float(ratio):.0%}", **row} for ratio, row in found["perplexity"].items()}
    shapes = list(dict.fromkeys(cell(SHAPE, r) for r in found["results"]))
    rows[0.0] |= {"name": "dense", **dict.fromkeys(shapes, 1.0)}
    for r in found["results"]:
        rows[r["shape"]["mlp_ratio"]][cell(SHAPE, r)] = r["ratio"]
    times = {f"time / dense, {shape}": f"{{{shape}:.3f}}" for shape in shapes}
    return grid(rows.values(), {"dropped": "{name}", "perplexity": "{ppl:.1f}", **times})


def perplexity(found: dict[str, Any]) -> str:
    """Dense, then every configuration with its share of MACs."""
    dense = [{"label": f"dense, {name}", "in domain": found["dense"][name]} for name in ("bfloat16", "float32")]
    shares = "{macs[pruned]:.1%} + {macs[probe]:.1%} + {macs[compensation]:.1%}"
    columns = {"": "{label}", "block MACs + probe + compensation": shares}
    for title, key in (("calibrated on WikiText-2", "in domain"), ("on Python's documentation", "out of domain")):
        columns |= {title: f"{{{key}[ppl]:.1f}}", f"± ({key})": f"{{{key}[nll_stderr_vs_dense]:.3f}}"}
    return grid([*dense, *found["rows"]], {**columns, "machine": "{processor}"})


def cpu(found: dict[str, Any]) -> str:
    """As the suite prints it."""
    return suite_table(found["results"])


def blocks(found: dict[str, Any]) -> str:
    """One layer a row; decoding has bytes alone for its ideal."""
    rows = [{"ideal_with_probe": row["ideal"], **row} for row in found["rows"]]
    times = {"dense ms": "{dense_ms:.1f}", "pruned ms": "{pruned_ms:.1f}", "pruned / dense": "**{ratio:.3f}**"}
    ratios = {"ideal": "{ideal_with_probe:.3f}", "static / dense": "{static_ratio:.3f}"}
    return grid(rows, {"model": "{model}", "batch x length": SHAPE, **times, **ratios})


def break_even(found: dict[str, Any]) -> str:
    """One row a layer and ratio, one column a size, and from which size on the cost model prunes."""
    rows: dict[tuple, dict[str, Any]] = {}
    for row in found["rows"]:
        key = tuple(row[name] for name in ("dtype", "compiled", "attention_ratio", "model", "mlp_ratio"))
        what = f"{row['model']}, {row['dtype']}{', compiled' * row['compiled']}"
        rows.setdefault(key, {**row, "layer": what})[f"1 x {row['tokens']}"] = row["ratio"]
    sizes = sorted({row["tokens"] for row in found["rows"]})
    columns = {"layer of": "{layer}", "MLP": "{mlp_ratio:.0%}", "heads": "{attention_ratio:.0%}"}
    columns |= {f"time / dense, 1 x {size}": f"{{1 x {size}:.3f}}" for size in sizes}
    return grid(rows.values(), {**columns, "pruned from, tokens": "**{predicted:.0f}**"})


def gpu(found: dict[str, Any]) -> str:
    """Every side of every shape."""
    rows = [{**row, "side": name, **side} for row in found["rows"] for name, side in row["sides"].items()]
    times = {"wall ms": "{wall_ms:.2f}", "/ dense": "{ratio:.3f}", "device / dense": "{device_ratio:.3f}"}
    return grid(rows, {"": "{name}", "layers": "{row[layers]}", "side": "{side}", **times, "ideal": "{ideal:.3f}"})


def decode_quality(found: dict[str, Any]) -> str:
    """Perplexity on both texts, then against the sticky default."""
    topics = ("same topic", "topic changes")
    columns = {"": "{name}", **{topic: f"{{{topic}[ppl]:.1f}}" for topic in topics}}
    columns |= {f"NLL - sticky's, {topic}": f"{{{topic}[nll_vs_sticky]:+.3f}}" for topic in topics}
    return grid([{"name": name, **row} for name, row in found["results"].items()], columns)


def generated(found: dict[str, Any]) -> str:
    """Solved, lost and gained, and a decode step of one sequence."""
    rows = [
        {"name": "dense", **found["dense"]},
        *({**row, **row.get("decode", {}).get("1", {})} for row in found["rows"]),
    ]
    against = {"lost / gained": "{lost} / {gained}", "above dense (95%)": "{interval[0]:+.1f} .. {interval[1]:+.1f}"}
    timed = any("decode" in row for row in found["rows"])
    step = {"step / dense, one sequence": "{ratio:.3f}", "bytes / dense": "{ideal:.3f}"} if timed else {}
    return grid(rows, {"": "{name}", f"solved of {found['problems']}": "{solved}", **against, **step})


def quantized(found: dict[str, Any]) -> str:
    """Every ratio of every kind of weights; dense rows have no time against themselves."""
    rows = [{**row, "megabytes": row["block_bytes"] / 1e6} for row in found["rows"]]
    columns = {"weights": "{weights}", "MLP dropped": "{mlp_ratio:.0%}", "MB of the layers": "{megabytes:.0f}"}
    columns |= {"perplexity": "{ppl:.1f}"}
    columns |= {"NLL above dense of the same weights": "{nll_above_dense:+.3f} ± {nll_stderr:.3f}"}
    for phase in (name for name in ("decode 1 x 128", "prefill 1 x 512") if name in found["rows"][0]):
        columns |= {f"{phase} / dense of the same weights": f"{{{phase}[ratio]:.3f}}"}
        columns |= {f"{phase} / dense {found['dtype']}": f"**{{{phase}[against_dense]:.3f}}**"}
    return grid(rows, columns)


def quantized_tasks(found: dict[str, Any]) -> str:
    """Solved programs and the bytes of the decoder layers, by weights and ratio."""
    rows = [{**row, "megabytes": row["block_bytes"] / 1e6} for row in found["rows"]]
    columns = {"weights": "{weights}", "MLP dropped": "{mlp_ratio:.0%}", "MB of the layers": "{megabytes:.0f}"}
    against = {
        "lost / gained": "{lost} / {gained}",
        "above dense bf16 (95%)": "{interval[0]:+.1f} .. {interval[1]:+.1f}",
    }
    return grid(rows, {**columns, f"solved of {found['problems']}": "**{solved}**", **against})


def step_kernels(found: dict[str, Any]) -> str:
    """Microseconds of an MLP, against the dense products, against the same kernel on all rows, against a copy."""
    columns = {"layer of": "{model}", "weights": "{weights}", "kept": "{kept:.0%}", "us": "{mlp_us[ours]:.0f}"}
    columns |= {
        "dense us": "{mlp_us[dense]:.0f}",
        "/ dense": "**{ratio:.3f}**",
        "/ all rows, same kernel": "{against_own:.3f}",
    }
    return grid(found["rows"], {**columns, "rate / a copy's": "{copy_share:.2f}"})


def mixed_batches(found: dict[str, Any]) -> str:
    """The whole, and each of the two texts."""
    parts = {"perplexity": "{ppl:.1f}", "of the text": "{ppl_text:.1f}", "of the documentation": "{ppl_docs:.1f}"}
    nll = {"NLL against the mixed batch": "{nll_against_mixed:+.3f} ± {nll_stderr:.3f}"}
    return grid([{"label": "dense", **found["dense"]}, *found["rows"]], {"": "{label}", **parts, **nll})


def compare(found: dict[str, Any]) -> str:
    """One method a row."""
    quality = {"perplexity": "{ppl:.1f}", "NLL above dense (paired)": "{nll_above_dense:.3f} ± {nll_stderr:.3f}"}
    costs = {"block MACs in all": "{macs[total]:.1%}", "time / dense": "{time_ratio:.2f}"}
    rows = [{"method": "dense", **found["dense"]}, *found["rows"]]
    return grid(rows, {"method": "{method}", **quality, **costs, "perplexity lost / time saved": "{prr:.0f}"})


def onnx_runtime(found: dict[str, Any]) -> str:
    """Milliseconds, and ratios to either dense file."""
    sides, rows = ("genai dense", "own dense", "pruned"), []
    for row in found["rows"]:
        ms = dict(zip(("genai", "own", "pruned", "bodies", "last"), row["ms"].values(), strict=False))
        pairs = [(a, b) for a in ("pruned", "bodies", "last") for b in ("genai", "own") if a in ms]
        rows.append({**row, **{f"{a} / {b}": ms[a] / ms[b] for a, b in pairs}})
    columns = {"": "{phase}", "threads": "{threads}", **{side: f"{{ms[{side}]:.1f}}" for side in sides}}
    ratios = ("pruned / genai", "pruned / own", "bodies / genai", "last / genai")
    seconds, peak, weights = found["export"].values()
    return grid(rows, {**columns, **{name: f"{{{name}:.3f}}" for name in ratios}}) + (
        f"\nThe export took {seconds:.0f} s with its comparison, and peaked at {peak / 1e9:.1f} GB (the weights: "
        f"{weights / 1e9:.2f} GB).\n"
    )


def onnx_quantized(found: dict[str, Any]) -> str:
    """Files of one model beside each other, times against genai's dense file of 4 bits."""
    base = {row["model"]: row for row in found["rows"] if row["file"] == "genai dense int4"}
    rows = [{**row, "against": base[row["model"]], "mb": row["bytes"] / 1e6} for row in found["rows"]]
    for row in rows:
        row |= {f"{phase}_ratio": row[f"{phase}_ms"] / row["against"][f"{phase}_ms"] for phase in ("prefill", "decode")}
    columns = {"model": "{model}", "file": "{file}", "MB": "{mb:.0f}", "perplexity": "{perplexity:.1f}"}
    columns |= {"prefill 1 x 512, ms": "{prefill_ms:.0f}", "/ genai int4": "**{prefill_ratio:.3f}**"}
    columns |= {"decode 1 x 128, ms": "{decode_ms:.1f}", "decode / genai int4": "**{decode_ratio:.3f}**"}
    return grid(rows, columns)


def serving(found: dict[str, Any]) -> str:
    """Perplexity of prompts, then the loads against dense."""
    columns = {"": "{label}", "transformers, batches of one": "{transformers:.1f}"}
    columns |= {"vLLM, one request a step": "{alone:.1f}", "vLLM, up to four": "{in company:.1f}"}
    columns |= {"block MACs": "{macs:.3f}"}
    return grid(found["rows"], columns | loads(found))


def loads(found: dict[str, Any]) -> dict[str, str]:
    """Columns of throughput and time for every load that was served."""
    columns = {}
    for load in found["loads"]:
        columns |= {f"tokens/s, {load}": f"{{{load}[tokens_per_second]:.0f}}"}
        columns |= {f"time / dense, {load}": f"{{{load}[ratio]:.3f}}"}
    return columns


def continuous_batching(found: dict[str, Any]) -> str:
    """The loads against a stock model."""
    return grid(found["rows"], {"": "{label}", **loads(found)})


def serving_tasks(found: dict[str, Any]) -> str:
    """Solved problems, by the ratio of the prompts."""
    rows = [{"interval": ("", ""), **row} for row in found["rows"]]
    for row in rows:
        low, high = row["interval"]
        row["against"] = f"{low:+.1f} to {high:+.1f}" if row["mlp_ratio"] else ""
    columns = {"MLP of prompts dropped": "{mlp_ratio:.0%}", f"solved of {found['problems']}": "{solved}"}
    return grid(rows, {**columns, "against dense, 95%": "{against}"})


def serving_layer(found: dict[str, Any]) -> str:
    """One row a shape and ratio, one column a step's tokens."""
    rows: dict[tuple[str, str, float], dict[str, Any]] = {}
    for row in found["rows"]:
        key = (row["model"], row["weights"], row["mlp_ratio"])
        rows.setdefault(key, {**row})[f"{row['tokens']} tokens"] = row["ratio"]
    tokens = list(dict.fromkeys(f"{row['tokens']} tokens" for row in found["rows"]))
    columns = {"layer of": "{model}", "weights": "{weights}", "dropped": "{mlp_ratio:.0%}"}
    return grid(rows.values(), {**columns, **{f"time / dense, {name}": f"{{{name}:.3f}}" for name in tokens}})


def shards(found: dict[str, Any]) -> str:
    """One number of shards a row, against one choice among all channels."""
    columns = {"model": "{model}", "MLP dropped": "{mlp_ratio:.0%}", "shards": "{shards}"}
    for title, key in (("choice by shard", "choice"), ("and compensation", "choice and compensation")):
        above = f"{{{key}[cost]:+.1%}} (NLL {{{key}[nll_above_one]:+.4f}} ± {{{key}[nll_stderr]:.4f}})"
        columns |= {f"perplexity, {title}": f"{{{key}[ppl]:.2f}}", f"{title}, above one shard": above}
    return grid(found["rows"], columns)


def settled(found: dict[str, Any]) -> str:
    """Two texts a model and ratio; then the time that a layer could save at most."""
    rows = [
        {**row, "text": text, **row[text], **{f"{one['share']:.0%}": one for one in row[text]["fixed"]}}
        for row in found["rows"]
        for text in ("same text", "other text")
    ]
    columns = {"model": "{model}", "MLP": "{mlp_ratio:.0%}", "text": "{text}", "batches": "{batches} + {scored}"}
    columns |= {"always kept": "{always:.1%}", "never": "{never:.1%}", "perplexity": "{ppl:.2f}"}
    shares = [f"{one['share']:.0%}" for one in found["layer"]["saved"]]
    columns |= {f"{share} fixed": f"{{{share}[change]:+.1%}} ± {{{share}[nll_stderr]:.3f}}" for share in shares}
    layer = found["layer"]
    saved = ", ".join(f"{one['saved']:.1%} with {one['share']:.0%} fixed" for one in layer["saved"])
    agree = "; ".join(
        f"{row['model']} at {row['mlp_ratio']:.0%}: {row['agreement']['always']:.1%}" for row in found["rows"]
    )
    return grid(rows, columns) + (
        f"\nOf the channels that every batch of the one text keeps the other keeps as often: {agree}. A layer of "
        f"Llama-2-7B's shapes at 1 x 512, MLP 40%: its products take {layer['dense_ms']:.0f} ms dense, the probe's "
        f"{layer['probe_ms']:.1f}, the copies {layer['copies_ms']:.1f}; saved at most {saved}.\n"
    )


def costs(found: dict[str, Any]) -> str:
    """Seconds and bytes before anything is saved."""
    rows = [{"name": k, **row, "share": row["state_bytes"] / row["weight_bytes"]} for k, row in found["rows"].items()]
    seconds = {"transform s": "{transform_seconds:.1f}", "restore s": "{restore_seconds:.2f}"}
    before, after = found["imports"].values()
    return grid(rows, {"model": "{name}", **seconds, "state / weights": "{share:.1%}"}) + (
        f"\n`import pp_fx` takes {after:.1f} s; torch and transformers alone take {before:.1f} s of them.\n"
    )


TABLES = {f.__name__.replace("_", "-"): f for f in (headline, perplexity, cpu, blocks, break_even, gpu)}
TABLES |= {
    f.__name__.replace("_", "-"): f
    for f in (decode_quality, generated, quantized, quantized_tasks, step_kernels, mixed_batches, compare)
}
TABLES |= {f.__name__.replace("_", "-"): f for f in (onnx_runtime, onnx_quantized, serving, continuous_batching)}
TABLES |= {f.__name__.replace("_", "-"): f for f in (serving_tasks, serving_layer, shards, settled, costs)}
TABLES |= {"cpu-xeon": cpu, "gpu-h200": gpu, "generated-164": generated}
TABLES |= {"quantized-fp32": quantized, "quantized-smollm2": quantized, "step-kernels-avx2": step_kernels}
"""Name of a file in benchmarks/results -> its table."""


def origin(found: dict[str, Any]) -> str:
    """Machine and versions, and which rows have settings of an older version."""
    rows = [row for row in found.get("rows", found.get("results", ())) if isinstance(row, dict)]
    machines = {row["processor"] for row in rows if "processor" in row} or {found.get("device", found.get("processor"))}
    machine = "; ".join(sorted(name or "not noted" for name in machines))
    versions = {**found["versions"], "commit": found["versions"].get("commit") or "not noted"}
    text = f"Machine: {machine}.\nVersions: {', '.join(f'{name} {version}' for name, version in versions.items())}.\n"
    old = [row for row in rows if row.get("config", {}).get("compensation_min_tokens") == 512]
    if old:
        names = "all rows" if len(old) == len(rows) else "; ".join(row.get("label") or label(row) for row in old)
        text += f"Of an older version (`compensation_min_tokens` was 512, now 2048 on a CPU): {names}.\n"
    return text


def rendered(page: str) -> str:
    """The page with its tables as measured; a table whose file is not there stays as it is."""
    for name, table in TABLES.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            block = f"<!-- {name} -->\n\n{table(found)}\nFile: `benchmarks/results/{name}.json`. {origin(found)}\n"
            page = re.sub(f"<!-- {name} -->.*?(?=<!-- /{name} -->)", lambda _, new=block: new, page, flags=re.DOTALL)
    return page


def main() -> None:
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
