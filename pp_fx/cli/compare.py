"""`pp-fx compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..measure import compare as of_text
from ..measure import compare_task as of_task
from ..methods import METHODS
from ..requirements import versions
from ..text import read, sequences
from .app import app
from .options import (
    CALIBRATION,
    Batch,
    DecodeRatio,
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
from .tasks import NewTokens, Problems, Task, Text, check_text_or_task, problems_of


@app.command("compare")
def compare_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or smollm2 (embedded).")],
    calibration: Annotated[str, typer.Option(help=f"{CALIBRATION}.")],
    text: Text = None,
    task: Task = None,
    methods: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(METHODS)}; all.")] = "all",
    ratios: Annotated[str, typer.Option(help="Comma-separated shares of MLP channels dropped.")] = "0.2,0.4",
    decodes: Annotated[
        str, typer.Option(help="Of --task: comma-separated, of sticky, step, dense, probe, rolling.")
    ] = "sticky",
    decode_ratio: DecodeRatio = None,
    attention_ratio: Annotated[float, typer.Option(help="Share of query heads dropped, in all rows.")] = 0.0,
    sequence_count: Annotated[int, typer.Option("--sequences", help="Sequences from the start of the text.")] = 20,
    length: Length = 512,
    problem_count: Problems = None,
    new_tokens: NewTokens = 256,
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
    """Pruning methods side by side: perplexity with paired standard errors, MACs, time, perplexity per time saved.

    With --task: problems solved with paired intervals, and time, of every way of decoding.
    """
    check_text_or_task(
        context,
        text,
        task,
        ("sequence_count", "length", "time_batch"),
        ("problem_count", "new_tokens", "decodes", "decode_ratio"),
    )
    console = console_for(json_file)
    names, shares = names_of(methods), numbers_of(ratios)
    evaluated, sampled = None if text is None else read(text), read(calibration, "calibration")
    if plot_file is not None:
        check_folder("plot", plot_file)
        of_text.require_matplotlib()
    common: dict[str, Any] = {
        "methods": names,
        "ratios": shares,
        "attention_ratio": attention_ratio,
        "batch": batch,
        "changes": {} if round_to is None else {"round_to": round_to},
    }
    ways = tuple(way.strip() for way in decodes.split(","))
    if task is not None:
        of_task.rows_asked(
            names, shares, ways, decode_ratio, attention_ratio, common["changes"]
        )  # before the weights are read
    problems = [] if task is None else problems_of(problem_count, batch, new_tokens)
    loaded, tokenizer = load_dense(model, dtype)
    progress = json_file != "-"
    shown: Any = of_text if task is None else of_task
    if evaluated is not None:
        ids = sequences(evaluated, tokenizer, sequence_count, length)
        sample = calibration_of(sampled, tokenizer, loaded)
        result = of_text.compare(loaded, ids, sample, **common, time_batch=time_batch, progress=progress)
        result["versions"] = versions()
        title = f"{model}, {ids.shape[0]} x {length} tokens"
    else:
        sample = calibration_of(sampled, tokenizer, loaded)
        result = of_task.compare_task(
            loaded, tokenizer, problems, sample, **common, decodes=ways, decode_ratio=decode_ratio,
            new_tokens=new_tokens, progress=progress,
        )  # fmt: skip
        title = f"{model}, {task}"
    result = {"model": model, **result}
    write_json(result, json_file)
    if plot_file is not None:
        shown.plot(result, title, Path(plot_file))
    if progress:
        console.print(shown.table(result, title))
