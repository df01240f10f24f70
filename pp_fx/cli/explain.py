"""`pp-fx explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..integrations.hf_config import saved_settings
from ..measure.explain import explain
from ..models import load_config
from .app import app
from .options import (
    AttentionRatio,
    Config,
    Json,
    MlpRatio,
    Preset,
    SkipLayers,
    console_for,
    read_settings,
    write_json,
)


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
    console = console_for(json_file)
    settings = read_settings(preset, config, mlp_ratio, attention_ratio, skip_layers)
    described = load_config(model)
    if (mlp_ratio, attention_ratio, skip_layers, preset, config) == (None, None, None, "default", None):
        settings = saved_settings(described) or settings
    found = explain(described, settings, batch=batch, length=length)
    write_json(found.to_dict(), json_file)
    if json_file != "-":
        console.print(found.table())
