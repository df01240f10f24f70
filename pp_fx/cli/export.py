"""`pp-fx export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import export
from ..calibration.calibrate import calibrate
from ..checks import check_choice
from ..errors import InputError
from ..integrations.hf_config import saved_settings
from ..models import load, load_config
from ..requirements import versions
from ..rewrite.layer import config_of, is_transformed
from ..rewrite.transform import transform
from ..text import PYTHON_DOCS, read
from .app import app
from .options import (
    CALIBRATION,
    AttentionRatio,
    Config,
    Decode,
    DecodeRatio,
    Json,
    MlpRatio,
    Preset,
    SkipLayers,
    calibration_of,
    check_calibrated,
    check_fit,
    console_for,
    read_settings,
    write_json,
)


@app.command("export")
def export_command(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or smollm2 (embedded).")],
    directory: Annotated[Path, typer.Argument(help="Folder to write: model.onnx and everything around it.")],
    calibration: Annotated[
        str, typer.Option(help=f"{CALIBRATION}; none: no history. A model saved with its pruning keeps its own.")
    ] = PYTHON_DOCS,
    mlp_ratio: MlpRatio = None,
    attention_ratio: AttentionRatio = None,
    skip_layers: SkipLayers = None,
    preset: Preset = "default",
    config: Config = None,
    decode: Decode = None,
    decode_ratio: DecodeRatio = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    weights: Annotated[
        str | None, typer.Option(help="int8 or int4: round the linear layers' weights; by default as DTYPE.")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 23 or 24.")] = 23,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of an earlier export.")] = False,
    json_file: Json = None,
) -> None:
    """Write MODEL, pruned, as an ONNX folder for onnxruntime, and compare it with torch."""
    export.check_target(directory, overwrite)
    console = console_for(json_file)
    settings = read_settings(preset, config, mlp_ratio, attention_ratio, skip_layers, decode, decode_ratio)
    check_choice("dtype", dtype, ("float32", "float16"))
    if weights is not None:
        check_choice("weights", weights, ("int8", "int4"))
    sample = None if calibration == "none" else read(calibration, "calibration")
    if saved_settings(load_config(model)) is None:
        check_fit(settings, model)
        check_calibrated(settings, calibration)
    loaded, tokenizer = load(model, torch.float32)
    if is_transformed(loaded):
        if (mlp_ratio, attention_ratio, skip_layers, preset, config) != (None, None, None, "default", None):
            raise InputError(f"model={model!r} is saved with its own pruning; leave ratios, preset and config out")
        settings, sample = config_of(loaded), None
    else:
        transform(loaded, settings)
    if sample is not None:
        calibrate(loaded, calibration_of(sample, tokenizer, loaded), progress=json_file != "-")
    if dtype == "float16":
        loaded.half()
    export.onnx(loaded, directory, tokenizer=tokenizer, opset=opset, overwrite=overwrite, weights=weights)
    found = export.check(directory)
    size = sum(f.stat().st_size for f in directory.iterdir())
    result = {"model": model, "directory": str(directory), "bytes": size, "check": found.to_dict()}
    write_json({**result, "config": settings.to_dict(), "versions": versions()}, json_file)
    found.require()
    console.print(
        f"{directory}: {size / 1e6:.0f} MB; onnxruntime and torch differ by {found.difference:.1e} of the largest "
        f"logit, kept units agree at {found.agreement:.2%}"
    )
