"""`pp-fx bench`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..checks import check_choice
from ..measure.bench import bench
from ..requirements import versions
from ..text import PYTHON_DOCS, read, sequences
from .app import app
from .options import (
    AttentionRatio,
    Compile,
    Config,
    Decode,
    DecodeRatio,
    Dtype,
    Json,
    MlpRatio,
    Preset,
    SkipLayers,
    check_fit,
    console_for,
    load_dense,
    read_settings,
    write_json,
)


@app.command("bench")
def bench_command(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or smollm2 (embedded).")],
    phase: Annotated[str, typer.Option(help="prefill or decode.")] = "prefill",
    batch: Annotated[int, typer.Option(help="Prompts, side by side.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens per prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after the prompt.")] = 32,
    dtype: Dtype = "bfloat16",
    mlp_ratio: MlpRatio = None,
    attention_ratio: AttentionRatio = None,
    skip_layers: SkipLayers = None,
    preset: Preset = "default",
    config: Config = None,
    decode: Decode = None,
    decode_ratio: DecodeRatio = None,
    compile_model: Compile = False,
    freezing: Annotated[
        bool, typer.Option(help="With --compile: Inductor's freezing (packed weights) for both.")
    ] = False,
    guard: Annotated[
        bool | None,
        typer.Option(help="Calls too small to pay stay dense, measured first; or none do. Default: by a cost model."),
    ] = None,
    attention: Annotated[str, typer.Option(help="Attention implementation of both models: sdpa or eager.")] = "sdpa",
    repeats: Annotated[int, typer.Option(help="Timed prefills of each model.")] = 9,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    text: Annotated[str, typer.Option(help=f"UTF-8 file with the prompts, or {PYTHON_DOCS}.")] = PYTHON_DOCS,
    json_file: Json = None,
) -> None:
    """Time of MODEL, pruned against dense, interleaved in one process: decoder blocks, and with the LM head."""
    console = console_for(json_file)
    settings = read_settings(preset, config, mlp_ratio, attention_ratio, skip_layers, decode, decode_ratio)
    if guard is not None:
        settings = dataclasses.replace(settings, guard=guard)
    check_choice("attention", attention, ("sdpa", "eager"))
    prompts = read(text)
    check_fit(settings, model)
    loaded, tokenizer = load_dense(model, dtype)
    loaded.set_attn_implementation(attention)
    ids = sequences(prompts, tokenizer, batch, length)

    def progress(items: Any, label: str) -> Any:
        return items if json_file == "-" else track(items, label, console=Console(stderr=True), transient=True)

    result = bench(
        loaded, ids, settings, phase=phase, new_tokens=new_tokens, compiled=compile_model,
        freezing=freezing, repeats=repeats, threads=threads, progress=progress,
    )  # fmt: skip
    result = {"model": model, **result, "versions": versions()}
    write_json(result, json_file)
    if json_file != "-":
        console.print(_bench_table(result))


def _bench_table(result: dict[str, Any]) -> Table:
    settings, head = result["settings"], result["with_head"]
    shape = f"{settings['batch']} x {settings['length']}"
    table = Table(title=f"{result['model']}, {settings['phase']} {shape}, {settings['dtype']}, ms per call")
    for column in ("", "dense", "pruned", "ratio", "ideal", "ratio / ideal"):
        table.add_column(column, justify="left" if not column else "right")
    for label, row in (("decoder blocks", result), ("with LM head", head)):
        ideal = row.get("ideal_with_probe", row["ideal"])
        numbers = (row["dense_ms"], row["pruned_ms"], row["ratio"], ideal, row["ratio"] / ideal)
        table.add_row(label, *(f"{n:.2f}" if i < 2 else f"{n:.3f}" for i, n in enumerate(numbers)))
    for label, ratio in (("static", result["static_ratio"]), ("masked", result["masked_ratio"])):
        if ratio is not None:  # the same channels, cut out of the weights once or set to zero
            dense = result["dense_ms"]
            table.add_row(f"decoder blocks, {label}", f"{dense:.2f}", f"{ratio * dense:.2f}", f"{ratio:.3f}")
    return table
