"""`pp-fx report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..measure.report import report
from ..text import PYTHON_DOCS, read, sequences
from .app import app
from .options import CALIBRATION, Batch, Dtype, Length, calibration_of, load_dense, names_of, numbers_of


@app.command("report")
def report_command(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or smollm2 (embedded).")],
    directory: Annotated[Path, typer.Argument(help="Folder to write: report.html, pictures, report.json.")],
    text: Annotated[str, typer.Option(help=f"UTF-8 file, or {PYTHON_DOCS}.")] = PYTHON_DOCS,
    calibration: Annotated[str | None, typer.Option(help=f"{CALIBRATION}; left out: what follows the text.")] = None,
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = "default,paper,wanda_sp,flap",
    ratios: Annotated[str, typer.Option(help="Shares of MLP channels dropped, separated by commas.")] = "0.2,0.4",
    sequence_count: Annotated[int, typer.Option("--sequences", help="Sequences from the start of the text.")] = 16,
    length: Length = 512,
    batch: Batch = 4,
    dtype: Dtype = "bfloat16",
) -> None:
    """Measure MODEL and write a page that shows quality against time, what is kept, and what it costs."""
    texts = read(text), None if calibration is None else read(calibration, "calibration")
    loaded, tokenizer = load_dense(model, dtype)
    if texts[1] is None:
        both = sequences(texts[0], tokenizer, 2 * sequence_count, length)
        ids, sample = both[:sequence_count], both[sequence_count:]
    else:
        ids = sequences(texts[0], tokenizer, sequence_count, length)
        sample = calibration_of(texts[1], tokenizer, loaded)
    found = report(
        loaded, ids, sample, directory, methods=names_of(methods), ratios=numbers_of(ratios), batch=batch, title=model
    )
    Console().print(f"{found}: open it in a browser", soft_wrap=True)
