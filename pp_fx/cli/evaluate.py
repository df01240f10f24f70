"""`pp-fx eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..measure.macs import Macs
from ..measure.run_eval import run_eval
from ..measure.run_task import run_task
from ..ranks import processes
from ..text import read, sequences
from .app import app
from .options import (
    CALIBRATION,
    AttentionRatio,
    Batch,
    Compile,
    Config,
    Decode,
    DecodeRatio,
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
from .tasks import NewTokens, Problems, Task, Text, check_one_process, check_text_or_task, problems_of, show_task


@app.command("eval")
def eval_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or smollm2 (embedded).")],
    text: Text = None,
    task: Task = None,
    calibration: Annotated[str | None, typer.Option(help=f"{CALIBRATION}; left out: probe alone.")] = None,
    sequence_count: Annotated[int, typer.Option("--sequences", help="Sequences from the start of the text.")] = 20,
    length: Length = 512,
    problem_count: Problems = None,
    new_tokens: NewTokens = 256,
    batch: Batch = 20,
    dtype: Dtype = "bfloat16",
    mlp_ratio: MlpRatio = None,
    attention_ratio: AttentionRatio = None,
    skip_layers: SkipLayers = None,
    preset: Preset = "default",
    config: Config = None,
    decode: Decode = None,
    decode_ratio: DecodeRatio = None,
    compile_model: Compile = False,
    json_file: Json = None,
) -> None:
    """Perplexity and time of MODEL, dense and pruned, over a text; or how many problems of a task it solves.

    Under torchrun the processes share the batches of a text.
    """
    check_text_or_task(
        context,
        text,
        task,
        ("sequence_count", "length", "compile_model"),
        ("problem_count", "new_tokens", "decode", "decode_ratio"),
    )
    console = console_for(json_file)
    settings = read_settings(preset, config, mlp_ratio, attention_ratio, skip_layers, decode, decode_ratio)
    dtype_of(dtype)
    check_calibrated(settings, calibration)
    texts = {} if text is None else {"text": read(text)}
    if calibration is not None:
        texts["calibration"] = read(calibration, "calibration")
    check_fit(settings, model)
    problems = [] if task is None else problems_of(problem_count, batch, new_tokens)
    with processes() as rank:
        check_one_process(task)
        loaded, tokenizer = load_dense(model, dtype)
        ids = None if text is None else sequences(texts["text"], tokenizer, sequence_count, length)
        sample = None if calibration is None else calibration_of(texts["calibration"], tokenizer, loaded)
        progress = json_file != "-" and rank == 0
        if ids is not None:
            result = run_eval(loaded, ids, batch, settings, sample, compiled=compile_model, progress=progress)
        else:
            result = run_task(
                loaded, tokenizer, problems, settings, sample, batch=batch, new_tokens=new_tokens, progress=progress
            )
    if rank == 0:
        show = show_evaluation if task is None else show_task
        show({"model": model, **result}, json_file, console)


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
