"""`pp-fx compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..measure.compare import compare, plot, require_matplotlib, table
from ..methods import METHODS
from ..requirements import versions
from ..text import PYTHON_DOCS, read, sequences
from .app import app
from .options import (
    CALIBRATION,
    Batch,
    Dtype,
    Json,
    Length,
    calibration_of,
    check_folder,
    console_for,
    load_dense,
    names_of,
    numbers_of,
    write_json,
)


@app.command("compare")
def compare_command(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or smollm2 (embedded).")],
    text: Annotated[str, typer.Option(help=f"UTF-8 file, or {PYTHON_DOCS}.")],
    calibration: Annotated[str, typer.Option(help=f"{CALIBRATION}.")],
    methods: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(METHODS)}; all.")] = "all",
    ratios: Annotated[str, typer.Option(help="Comma-separated shares of MLP channels dropped.")] = "0.2,0.4",
    attention_ratio: Annotated[float, typer.Option(help="Share of query heads dropped, in all rows.")] = 0.0,
    sequence_count: Annotated[int, typer.Option("--sequences", help="Sequences from the start of the text.")] = 20,
    length: Length = 512,
    batch: Batch = 20,
    dtype: Dtype = "bfloat16",
    round_to: Annotated[
        int | None,
        typer.Option(help="Kept MLP channels are a multiple of it (paper's own: 64); else the device's own."),
    ] = None,
    time_batch: Annotated[int, typer.Option(help="Sequences of the timed forward passes; 0: no timing.")] = 4,
    json_file: Json = None,
    plot_file: Annotated[str | None, typer.Option("--plot", help="Write the plot as PNG to FILE.")] = None,
) -> None:
    """Pruning methods side by side: perplexity with paired standard errors, MACs, time, perplexity per time saved."""
    console = console_for(json_file)
    names, shares = names_of(methods), numbers_of(ratios)
    texts = read(text), read(calibration, "calibration")
    if plot_file is not None:
        check_folder("plot", plot_file)
        require_matplotlib()
    loaded, tokenizer = load_dense(model, dtype)
    ids, sample = sequences(texts[0], tokenizer, sequence_count, length), calibration_of(texts[1], tokenizer, loaded)
    result = compare(
        loaded, ids, sample, methods=names, ratios=shares, attention_ratio=attention_ratio, batch=batch,
        time_batch=time_batch, changes={} if round_to is None else {"round_to": round_to}, progress=json_file != "-",
    )  # fmt: skip
    title = f"{model}, {ids.shape[0]} x {length} tokens"
    result = {"model": model, **result, "versions": versions()}
    write_json(result, json_file)
    if plot_file is not None:
        plot(result, title, Path(plot_file))
    if json_file != "-":
        console.print(table(result, title))
