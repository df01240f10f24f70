"""Command line `pp-fx`: thin over the Python API."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import __version__
from .arguments import check_integers, learned_positions
from .bench import bench
from .calibrate import calibrate
from .compare import compare, plot, require_matplotlib, table
from .config import ProbePruningConfig
from .distributed import processes, world
from .errors import InputError, PpFxError
from .evaluate import evaluate
from .explain import explain
from .hf_quantizer import saved_settings
from .history import history_frozen
from .macs import Macs, count_macs, kept_per_layer
from .methods import METHODS
from .models import EMBEDDED, load, load_config
from .report import report
from .text import PYTHON_DOCS, read, sequences
from .transform import config_of, is_transformed, restore, transform

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_debug = False


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pp-fx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Probe Pruning: run only the attention heads and MLP channels that a batch needs.

    Begin with `pp-fx demo`; `pp-fx explain MODEL` tells what of a model can be pruned, `pp-fx eval` what it costs in
    perplexity, `pp-fx bench` what it saves in time, `pp-fx report` shows both; `pp-fx export` writes ONNX.

    Exit codes: 0, done; 1, an error of the input, in one line; 2, wrong usage.
    """
    global _debug
    _debug = debug


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CALIBRATION = "Up to 64 x 512 tokens of a UTF-8 file, or of " + PYTHON_DOCS

Json = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to FILE; - is stdout.")]
Length = Annotated[int, typer.Option(help="Tokens per sequence.")]
Batch = Annotated[int, typer.Option(help="Sequences per forward pass; one selection is made per batch.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
MlpRatio = Annotated[float | None, typer.Option(help="Share of MLP channels dropped; of the preset: 0.4.")]
AttentionRatio = Annotated[
    float | None, typer.Option(help="Share of query heads dropped; default preset: 0, paper: as --mlp-ratio.")
]
SkipLayers = Annotated[int | None, typer.Option(help="The first so many layers stay dense; of the preset: 3.")]
Preset = Annotated[str, typer.Option(help="default, or paper (the authors' settings, attention heads too).")]
Config = Annotated[str | None, typer.Option(help="ProbePruningConfig as a JSON file.")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile(fullgraph=True).")]


@app.command()
def demo(json_file: Json = None) -> None:
    """Prune the embedded SmolLM2-135M per batch and show perplexity and time beside dense."""
    console = _console(json_file)
    console.print(
        "Model: SmolLM2-135M-Instruct. Text: Python's own documentation, the first half for calibration, the second "
        "for evaluation."
    )
    model, tokenizer = load(EMBEDDED, torch.bfloat16)
    ids = sequences(read(PYTHON_DOCS), tokenizer, 40, 512)
    result = run_eval(model, ids[20:], 20, ProbePruningConfig(), ids[:20], progress=json_file != "-")
    _report({"model": EMBEDDED, **result}, json_file, console)


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or smollm2 (embedded).")],
    text: Annotated[str, typer.Option(help=f"UTF-8 file, or {PYTHON_DOCS}.")],
    calibration: Annotated[str | None, typer.Option(help=f"{_CALIBRATION}; left out: probe alone.")] = None,
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
    console = _console(json_file)
    settings = _settings(preset, config, mlp_ratio, attention_ratio, skip_layers)
    _dtype(dtype)
    texts = {"text": read(text)}
    if calibration is not None:
        texts["calibration"] = read(calibration, "calibration")
    _check_fit(settings, model)
    with processes() as rank:
        loaded, tokenizer = _load_dense(model, dtype)
        ids = sequences(texts["text"], tokenizer, sequence_count, length)
        sample = None if calibration is None else _calibration(texts["calibration"], tokenizer, loaded)
        progress = json_file != "-" and rank == 0
        result = run_eval(loaded, ids, batch, settings, sample, compiled=compile_model, progress=progress)
    if rank == 0:
        _report({"model": model, **result}, json_file, console)


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
    compile_model: Compile = False,
    freezing: Annotated[
        bool, typer.Option(help="With --compile: Inductor's freezing (packed weights) for both.")
    ] = False,
    guard: Annotated[bool, typer.Option(help="Calls too small to pay stay dense (measured first).")] = False,
    attention: Annotated[str, typer.Option(help="Attention implementation of both models: sdpa or eager.")] = "sdpa",
    repeats: Annotated[int, typer.Option(help="Timed prefills of each model.")] = 9,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    text: Annotated[str, typer.Option(help=f"UTF-8 file with the prompts, or {PYTHON_DOCS}.")] = PYTHON_DOCS,
    json_file: Json = None,
) -> None:
    """Time of MODEL, pruned against dense, interleaved in one process: decoder blocks, and with the LM head."""
    console = _console(json_file)
    settings = _settings(preset, config, mlp_ratio, attention_ratio, skip_layers)
    if guard:
        settings = dataclasses.replace(settings, guard=True)
    if attention not in ("sdpa", "eager"):
        raise InputError(f"attention={attention!r} is unknown; choose sdpa or eager")
    prompts = read(text)
    _check_fit(settings, model)
    loaded, tokenizer = _load_dense(model, dtype)
    loaded.set_attn_implementation(attention)
    ids = sequences(prompts, tokenizer, batch, length)

    def progress(items: Any, label: str) -> Any:
        return items if json_file == "-" else track(items, label, console=Console(stderr=True), transient=True)

    result = bench(
        loaded, ids, settings, phase=phase, new_tokens=new_tokens, compiled=compile_model,
        freezing=freezing, repeats=repeats, threads=threads, progress=progress,
    )  # fmt: skip
    result = {"model": model, **result, "versions": versions()}
    _write(result, json_file)
    if json_file != "-":
        console.print(_bench_table(result))


@app.command("report")
def report_command(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or smollm2 (embedded).")],
    directory: Annotated[Path, typer.Argument(help="Folder to write: report.html, pictures, report.json.")],
    text: Annotated[str, typer.Option(help=f"UTF-8 file, or {PYTHON_DOCS}.")] = PYTHON_DOCS,
    calibration: Annotated[str | None, typer.Option(help=f"{_CALIBRATION}; left out: what follows the text.")] = None,
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = "default,paper,wanda_sp,flap",
    ratios: Annotated[str, typer.Option(help="Shares of MLP channels dropped, separated by commas.")] = "0.2,0.4",
    sequence_count: Annotated[int, typer.Option("--sequences", help="Sequences from the start of the text.")] = 16,
    length: Length = 512,
    batch: Batch = 4,
    dtype: Dtype = "bfloat16",
) -> None:
    """Measure MODEL and write a page that shows quality against time, what is kept, and what it costs."""
    texts = read(text), None if calibration is None else read(calibration, "calibration")
    loaded, tokenizer = _load_dense(model, dtype)
    if texts[1] is None:
        both = sequences(texts[0], tokenizer, 2 * sequence_count, length)
        ids, sample = both[:sequence_count], both[sequence_count:]
    else:
        ids = sequences(texts[0], tokenizer, sequence_count, length)
        sample = _calibration(texts[1], tokenizer, loaded)
    found = report(
        loaded, ids, sample, directory, methods=_names(methods), ratios=_numbers(ratios), batch=batch, title=model
    )
    Console().print(f"{found}: open it in a browser", soft_wrap=True)


@app.command("build-ort-ops")
def build_ort_ops_command(
    compiler: Annotated[str | None, typer.Option(help="g++ or clang++; default: the first one found.")] = None,
    json_file: Json = None,
) -> None:
    """Compile the native onnxruntime kernels for this machine: exported models then decode faster."""
    from .export import build_ort_ops

    library = build_ort_ops(compiler=compiler)
    _write({"library": str(library), "versions": versions()}, json_file)
    _console(json_file).print(f"{library}: pp_fx.export.OrtModel uses it from now on", soft_wrap=True)


@app.command("export")
def export_command(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or smollm2 (embedded).")],
    directory: Annotated[Path, typer.Argument(help="Folder to write: model.onnx and everything around it.")],
    calibration: Annotated[
        str, typer.Option(help=f"{_CALIBRATION}; none: no history. A model saved with its pruning keeps its own.")
    ] = PYTHON_DOCS,
    mlp_ratio: MlpRatio = None,
    attention_ratio: AttentionRatio = None,
    skip_layers: SkipLayers = None,
    preset: Preset = "default",
    config: Config = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    opset: Annotated[int, typer.Option(help="ONNX opset, 23 or 24.")] = 23,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of an earlier export.")] = False,
    json_file: Json = None,
) -> None:
    """Write MODEL, pruned, as an ONNX folder for onnxruntime, and compare it with torch."""
    from .export import check, check_target, onnx

    check_target(directory, overwrite)
    console = _console(json_file)
    settings = _settings(preset, config, mlp_ratio, attention_ratio, skip_layers)
    if dtype not in ("float32", "float16"):
        raise InputError(f"dtype={dtype!r} is unknown; choose float32 or float16")
    sample = None if calibration == "none" else read(calibration, "calibration")
    if saved_settings(load_config(model)) is None:
        _check_fit(settings, model)
    loaded, tokenizer = load(model, torch.float32)
    if is_transformed(loaded):
        if (mlp_ratio, attention_ratio, skip_layers, preset, config) != (None, None, None, "default", None):
            raise InputError(f"model={model!r} is saved with its own pruning; leave ratios, preset and config out")
        settings, sample = config_of(loaded), None
    else:
        transform(loaded, settings)
    if sample is not None:
        calibrate(loaded, _calibration(sample, tokenizer, loaded), progress=json_file != "-")
    if dtype == "float16":
        loaded.half()
    onnx(loaded, directory, tokenizer=tokenizer, opset=opset, overwrite=overwrite)
    found = check(directory)
    size = sum(f.stat().st_size for f in directory.iterdir())
    result = {"model": model, "directory": str(directory), "bytes": size, "check": found.to_dict()}
    _write({**result, "config": settings.to_dict(), "versions": versions()}, json_file)
    found.require()
    console.print(
        f"{directory}: {size / 1e6:.0f} MB; onnxruntime and torch differ by {found.difference:.1e} of the largest "
        f"logit, kept units agree at {found.agreement:.2%}"
    )


@app.command(
    "lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def lm_eval_command(context: typer.Context) -> None:
    """lm-eval's own command line (its arguments follow), which then knows models that were saved with their pruning."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise InputError(f"lm-eval needs the package {error.name}; run: pip install 'pp-fx[eval]'") from None
    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()


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


@app.command("explain")
def explain_command(
    model: Annotated[str, typer.Argument(help="Folder or hub id, whose configuration is enough, or smollm2.")],
    batch: Annotated[int, typer.Option(help="Prompts for which the probe is counted.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens per prompt.")] = 512,
    mlp_ratio: MlpRatio = None,
    attention_ratio: AttentionRatio = None,
    skip_layers: SkipLayers = None,
    preset: Preset = "default",
    config: Config = None,
    json_file: Json = None,
) -> None:
    """Which channels and heads of MODEL can be pruned, and why the rest stays dense. Needs no weights.

    A model saved with its pruning is explained with its own settings, unless others are given.
    """
    console = _console(json_file)
    settings = _settings(preset, config, mlp_ratio, attention_ratio, skip_layers)
    described = load_config(model)
    if (mlp_ratio, attention_ratio, skip_layers, preset, config) == (None, None, None, "default", None):
        settings = saved_settings(described) or settings
    found = explain(described, settings, batch=batch, length=length)
    _write(found.to_dict(), json_file)
    if json_file != "-":
        console.print(found.table())


@app.command("compare")
def compare_command(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or smollm2 (embedded).")],
    text: Annotated[str, typer.Option(help=f"UTF-8 file, or {PYTHON_DOCS}.")],
    calibration: Annotated[str, typer.Option(help=f"{_CALIBRATION}.")],
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
    console = _console(json_file)
    names, shares = _names(methods), _numbers(ratios)
    texts = read(text), read(calibration, "calibration")
    if plot_file is not None:
        _check_folder("plot", plot_file)
        require_matplotlib()
    loaded, tokenizer = _load_dense(model, dtype)
    ids, sample = sequences(texts[0], tokenizer, sequence_count, length), _calibration(texts[1], tokenizer, loaded)
    result = compare(
        loaded, ids, sample, methods=names, ratios=shares, attention_ratio=attention_ratio, batch=batch,
        time_batch=time_batch, changes={} if round_to is None else {"round_to": round_to}, progress=json_file != "-",
    )  # fmt: skip
    title = f"{model}, {ids.shape[0]} x {length} tokens"
    result = {"model": model, **result, "versions": versions()}
    _write(result, json_file)
    if plot_file is not None:
        plot(result, title, Path(plot_file))
    if json_file != "-":
        console.print(table(result, title))


def run_eval(
    model: Any,
    ids: torch.Tensor,
    batch: int,
    config: ProbePruningConfig,
    calibration: torch.Tensor | None,
    *,
    compiled: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate dense, transform in place, calibrate, evaluate pruned; the dict that `--json` writes.

    Compiled models are warmed up on the first batch with the history frozen, and measured frozen, so that `seconds`
    excludes compilation.
    """
    check_integers(1, batch=batch)
    rank, ranks = world()

    def measure(label: str) -> Any:
        forward = torch.compile(model, fullgraph=True) if compiled else None
        if forward is not None:
            with torch.no_grad(), history_frozen(model):
                forward(input_ids=ids[:batch], use_cache=False)
                return evaluate(model, ids, batch, forward=forward, progress=label if progress else None)
        with history_frozen(model) if ranks > 1 else contextlib.nullcontext():  # each rank would learn of its own share
            return evaluate(model, ids, batch, progress=label if progress else None)

    dense = measure("dense")
    transform(model, config)
    if calibration is not None:
        calibrate(model, calibration[rank::ranks], progress=progress)
    pruned = measure("pruned")
    macs = count_macs(model, min(batch, len(ids)), ids.shape[1])
    stderr = pruned.stderr_vs(dense) if len(ids) > 1 else None
    return {
        "config": config.to_dict(),
        "tokens": ids.numel(),
        "dense": dense.to_dict(),
        "pruned": {**pruned.to_dict(), "nll_stderr_vs_dense": stderr},
        "macs": dataclasses.asdict(macs),
        "kept": kept_per_layer(model),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions that the figures depend on."""
    import transformers

    return {
        "pp_fx": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _settings(
    preset: str, config: str | None, mlp: float | None, attention: float | None, skip: int | None
) -> ProbePruningConfig:
    if preset not in ("default", "paper"):
        raise InputError(f"preset={preset!r} is unknown; choose default or paper")
    asked = {"mlp_ratio": mlp, "attention_ratio": attention, "skip_layers": skip}
    given: dict[str, Any] = {k: v for k, v in asked.items() if v is not None}
    if config is not None:
        if preset != "default":
            raise InputError(f"config={config!r} and preset={preset!r} exclude each other; give one of them")
        base = ProbePruningConfig.from_json(_json_file(config)).to_dict()
        return ProbePruningConfig.from_dict({**base, **given})
    if preset == "paper":
        ratio = given.pop("mlp_ratio", 0.4)
        return ProbePruningConfig.paper(ratio, **given)
    return ProbePruningConfig(**given)


def _check_fit(config: ProbePruningConfig, model: str) -> None:
    """Ratios and skipped layers against the model's number of layers, before its weights are read."""
    layers = getattr(load_config(model).get_text_config(decoder=True), "num_hidden_layers", None)
    for kind in ("mlp", "attention"):
        if layers is None:
            break  # `load` says what it is
        config.layer_ratios(f"{kind}_ratio", layers)


def _json_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"config={name!r} cannot be read ({error}); give a file of ProbePruningConfig.to_json()"
        ) from None


def _calibration(text: str, tokenizer: Any, model: Any) -> torch.Tensor:
    """The first 64 x 512 tokens of a text, or as many sequences as it holds: [N, 512], or the positions it has."""
    return sequences(text, tokenizer, None, min(512, learned_positions(model) or 512))[:64]


def _load_dense(model: str, dtype: str) -> tuple[Any, Any]:
    """A model as it is without pruning, and its tokenizer: the commands try configurations of their own."""
    loaded, tokenizer = load(model, _dtype(dtype))
    if is_transformed(loaded):
        Console(stderr=True).print(f"{model}: the pruning that it was saved with is left aside", style="yellow")
        restore(loaded)
    return loaded, tokenizer


def _names(methods: str) -> tuple[str, ...]:
    return tuple(METHODS) if methods == "all" else tuple(m.strip() for m in methods.split(","))


def _numbers(ratios: str) -> tuple[float, ...]:
    try:
        return tuple(float(r) for r in ratios.split(","))
    except ValueError:
        raise InputError(f"ratios={ratios!r} is not a list of numbers; give for example 0.2,0.4") from None


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise InputError(f"dtype={name!r} is unknown; choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _console(json_file: str | None) -> Console:
    """Where tables go; a file that cannot be written is found before the work."""
    if json_file != "-":
        _check_folder("json", json_file)
    return Console(stderr=json_file == "-")


def _check_folder(option: str, file: str | None) -> None:
    if file is not None and (not Path(file).parent.is_dir() or Path(file).is_dir()):
        raise InputError(f"{option}={file!r} cannot be written; give a file in a folder that exists")


def _write(result: dict[str, Any], json_file: str | None) -> None:
    if json_file == "-":
        print(json.dumps(result, indent=2))
    elif json_file is not None:
        try:
            Path(json_file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"json={json_file!r} cannot be written ({error}); give a path in a folder") from None


def _report(result: dict[str, Any], json_file: str | None, console: Console) -> None:
    _write(result, json_file)
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


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors in one line, exit code 1. `arguments`: without the program's name; default: those given."""
    try:
        app(arguments)
    except PpFxError as error:
        if _debug:
            raise
        text = _named_as_options(str(error), sys.argv[1:] if arguments is None else arguments)
        Console(stderr=True).print(f"pp-fx: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _named_as_options(message: str, arguments: list[str]) -> str:
    """An error of the Python API with its arguments called as the command calls them: overwrite=True, --overwrite.

    What stands in quotes are values.
    """
    commands: Any = typer.main.get_command(app)
    command = next((commands.commands[a] for a in arguments if a in commands.commands), None)
    options = [o for p in getattr(command, "params", []) for o in p.opts if o.startswith("--")]

    def renamed(text: str) -> str:
        for option in options:
            name = option[2:].replace("-", "_")
            text = re.sub(rf"\b{name}=True\b", option, text)
            text = re.sub(rf"(?<![\w./-]){name}(?==)", option, text)
            if "_" in name:
                text = re.sub(rf"(?<![\w./-]){name}\b", option, text)
        return text

    parts = re.split(r"('[^']*')", message)
    return "".join(part if part.startswith("'") else renamed(part) for part in parts)


if __name__ == "__main__":
    main()
