"""`pp-fx eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..calibration.ranks import processes
from ..measure.macs import Macs
from ..measure.run_eval import run_eval
from ..text import PYTHON_DOCS, read, sequences
from .app import app
from .options import (
    CALIBRATION,
    AttentionRatio,
    Batch,
    Compile,
    Config,
    Dtype,
    Json,
    Length,
    MlpRatio,
    Preset,
    SkipLayers,
    calibration_of,
    check_calibrated,
    check_fit,
    console_for,
    dtype_of,
    load_dense,
    read_settings,
    write_json,
)


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or smollm2 (embedded).")],
    text: Annotated[str, typer.Option(help=f"UTF-8 file, or {PYTHON_DOCS}.")],
    calibration: Annotated[str | None, typer.Option(help=f"{CALIBRATION}; left out: probe alone.")] = None,
    sequence_count: Annotated[int, typer.Option("--sequences", help="Sequences from the start of the text.")] = 20,
    length: Length = 512,
    batch: Batch = 20,
    dtype: Dtype = "bfloat16",
    mlp_ratio: MlpRatio = None,
    attention_ratio: AttentionRatio = None,
    skip_layers: SkipLayers = None,
    preset: Preset = "default",
    config: Config = None,
    compile_model: Compile = False,
    json_file: Json = None,
) -> None:
    """Perplexity and time of MODEL, dense and pruned, over a text. Under torchrun the processes share the batches."""
    console = console_for(json_file)
    settings = read_settings(preset, config, mlp_ratio, attention_ratio, skip_layers)
    dtype_of(dtype)
    check_calibrated(settings, calibration)
    texts = {"text": read(text)}
    if calibration is not None:
        texts["calibration"] = read(calibration, "calibration")
    check_fit(settings, model)
    with processes() as rank:
        loaded, tokenizer = load_dense(model, dtype)
        ids = sequences(texts["text"], tokenizer, sequence_count, length)
        sample = None if calibration is None else calibration_of(texts["calibration"], tokenizer, loaded)
        progress = json_file != "-" and rank == 0
        result = run_eval(loaded, ids, batch, settings, sample, compiled=compile_model, progress=progress)
    if rank == 0:
        show_evaluation({"model": model, **result}, json_file, console)


def show_evaluation(result: dict[str, Any], json_file: str | None, console: Console) -> None:
    """Table and JSON of `run_eval`."""
    write_json(result, json_file)
    dense, pruned, macs = result["dense"], result["pruned"], result["macs"]
    table = Table(title=f"{result['model']}, {result['tokens']} tokens")
    for column in ("", "perplexity", "nll", "seconds", "block MACs"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("dense", f"{dense['ppl']:.2f}", f"{dense['nll']:.4f}", f"{dense['seconds']:.2f}", "100%")
    table.add_row(
        "pruned",
        f"{pruned['ppl']:.2f}",
        f"{pruned['nll']:.4f}",
        f"{pruned['seconds']:.2f}",
        Macs(**macs).summary,
    )
    if json_file != "-":
        console.print(table)
