"""What the commands share: options, and how their values are read and their results written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..checks import check_choice, learned_positions
from ..config import ProbePruningConfig
from ..errors import InputError
from ..methods import METHODS
from ..models import load, load_config
from ..rewrite.layer import is_transformed
from ..rewrite.transform import restore
from ..text import PYTHON_DOCS, sequences

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CALIBRATION = "Up to 64 x 512 tokens of a UTF-8 file, or of " + PYTHON_DOCS

Json = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to FILE; - is stdout.")]
Length = Annotated[int, typer.Option(help="Tokens per sequence.")]
Batch = Annotated[int, typer.Option(help="Sequences per forward pass; one selection is made per batch.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
MlpRatio = Annotated[float | None, typer.Option(help="Share of MLP channels dropped; default: 0.2, preset paper: 0.4.")]
AttentionRatio = Annotated[
    float | None, typer.Option(help="Share of query heads dropped; default preset: 0, paper: as --mlp-ratio.")
]
SkipLayers = Annotated[
    int | None,
    typer.Option(help="The first so many layers stay dense; default: late layers alone are pruned; other presets: 3."),
]
PRESETS = [name for name, method in METHODS.items() if method.planner is None]
"""Methods whose ratios are as they were asked for; one with a planner spreads them (`pp-fx compare`)."""
Preset = Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}; paper: the authors' settings, attention heads too.")]
Decode = Annotated[
    str | None, typer.Option(help="While decoding: sticky, step, auto, dense, probe or rolling; else the config's.")
]
DecodeRatio = Annotated[
    float | None, typer.Option(help="Of --decode step: share of MLP channels each token leaves out; else --mlp-ratio.")
]
Config = Annotated[str | None, typer.Option(help="ProbePruningConfig as a JSON file.")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile(fullgraph=True).")]


def read_settings(
    preset: str,
    config: str | None,
    mlp: float | None,
    attention: float | None,
    skip: int | None,
    decode: str | None = None,
    decode_ratio: float | None = None,
) -> ProbePruningConfig:
    """The configuration that a command's options describe.

    Raises:
        InputError: options that exclude each other, or an unknown preset.
        ConfigError: a value is out of range.
    """
    check_choice("preset", preset, PRESETS)
    asked: dict[str, Any] = {"mlp_ratio": mlp, "attention_ratio": attention, "skip_layers": skip}
    asked |= {"decode": decode, "decode_ratio": decode_ratio}
    given: dict[str, Any] = {k: v for k, v in asked.items() if v is not None}
    if config is not None:
        if preset != "default":
            raise InputError(f"config={config!r} and preset={preset!r} exclude each other; give one of them")
        base = ProbePruningConfig.from_json(_json_file(config)).to_dict()
        return ProbePruningConfig.from_dict({**base, **given})
    return ProbePruningConfig.preset(preset, **given)


def check_calibrated(config: ProbePruningConfig, calibration: str | None) -> None:
    """What chooses by the history alone needs one, before anything long begins.

    Raises:
        InputError: there is none.
    """
    if config.probe is None and calibration in (None, "none"):
        raise InputError(f"calibration={calibration!r} leaves probe=None nothing to choose by; give a text")


def check_fit(config: ProbePruningConfig, model: str) -> None:
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


def calibration_of(text: str, tokenizer: Any, model: Any) -> torch.Tensor:
    """The first 64 x 512 tokens of a text, or as many sequences as it holds: [N, 512], or the positions it has."""
    return sequences(text, tokenizer, None, min(512, learned_positions(model) or 512))[:64]


def load_dense(model: str, dtype: str) -> tuple[Any, Any]:
    """A model as it is without pruning, and its tokenizer: the commands try configurations of their own."""
    loaded, tokenizer = load(model, dtype_of(dtype))
    if is_transformed(loaded):
        Console(stderr=True).print(f"{model}: the pruning that it was saved with is left aside", style="yellow")
        restore(loaded)
    return loaded, tokenizer


def names_of(methods: str) -> tuple[str, ...]:
    """Of methods, separated by commas; all of them for "all"."""
    return tuple(METHODS) if methods == "all" else tuple(m.strip() for m in methods.split(","))


def numbers_of(ratios: str) -> tuple[float, ...]:
    """Of ratios, separated by commas."""
    try:
        return tuple(float(r) for r in ratios.split(","))
    except ValueError:
        raise InputError(f"ratios={ratios!r} is not a list of numbers; give for example 0.2,0.4") from None


def dtype_of(name: str) -> torch.dtype:
    """float32 or bfloat16."""
    check_choice("dtype", name, _DTYPES)
    return _DTYPES[name]


def console_for(json_file: str | None) -> Console:
    """Where tables go; a file that cannot be written is found before the work."""
    if json_file != "-":
        check_folder("json", json_file)
    return Console(stderr=json_file == "-")


def check_folder(option: str, file: str | None) -> None:
    """A file to write must lie in a folder that is there."""
    if file is not None and (not Path(file).parent.is_dir() or Path(file).is_dir()):
        raise InputError(f"{option}={file!r} cannot be written; give a file in a folder that exists")


def write_json(result: dict[str, Any], json_file: str | None) -> None:
    """The value of `--json`: a file, "-" for stdout, or None."""
    if json_file == "-":
        print(json.dumps(result, indent=2))
    elif json_file is not None:
        try:
            Path(json_file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"json={json_file!r} cannot be written ({error}); give a path in a folder") from None
