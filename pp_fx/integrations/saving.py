"""What a transformed model writes beside its ordinary weights: the configuration and the history; and reading it back.

`transform` gives the model object a `save_pretrained` of its own (this one), which calls transformers' and adds
`pp_fx_history.safetensors`; `hf_quantizer` reads both in `from_pretrained`. Weights keep their names and shapes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..calibration.history_file import holds_history, write_history
from ..errors import InputError, StateError
from ..layouts import is_plain
from ..process_settings import own_defaults
from ..rewrite.layer import config_of, layers_of
from ..rewrite.transform import SHADOWED
from ..runtime.names import LAYER
from .hf_config import SETTINGS, WEIGHTS, ProbePruningHfConfig, weights_fingerprint


@own_defaults()
def save_pretrained(
    model: Any, save_directory: str | os.PathLike, *, quantization_config: bool = True, **kwargs: Any
) -> None:
    """transformers' `save_pretrained`, and the history; config.json tells `from_pretrained` to prune.

    Args:
        model: a transformed model.
        save_directory: folder, made if need be.
        quantization_config: True writes the pruning's configuration into config.json, as transformers' method for what
            changes a model as it is loaded; many other tools refuse such a folder. False leaves config.json as the
            dense model's, which every tool loads, and writes `pp_fx_config.json` beside it; then
            `from_pretrained(folder, quantization_config=pp_fx.ProbePruningHfConfig.from_pretrained(folder))` prunes.
        **kwargs: of transformers' method.

    A quantized model's own configuration goes into config.json inside of the pruning's, or stays as it is with False.

    Raises:
        InputError: `push_to_hub=True`; `model.push_to_hub(repo_id)` sends the whole folder.
        StateError: weights were quantized in place (`torchao.quantize_`), which transformers does not save.
    """
    if kwargs.pop("push_to_hub", False):
        raise InputError("push_to_hub=True would leave the history behind; call model.push_to_hub(repo_id)")
    config = config_of(model)
    quantized = next((name for name, p in model.named_parameters() if not is_plain(p)), None)
    if quantized is not None and not hasattr(model, "hf_quantizer"):
        raise StateError(
            f"{quantized} was quantized in place, and transformers saves only what it has quantized itself; load the "
            "model with from_pretrained(.., quantization_config=TorchAoConfig(..))"
        )
    within = getattr(model.config, "quantization_config", None)
    settings = ProbePruningHfConfig(config, history_file=holds_history(model), quantization=within)
    if quantization_config:
        model.config.quantization_config = settings
    try:
        type(model).save_pretrained(model, save_directory, **kwargs)
    finally:
        if within is not None:
            model.config.quantization_config = within
        elif quantization_config:
            del model.config.quantization_config
    shards = layers_of(model)[0].__dict__[LAYER].shards
    main = kwargs.get("is_main_process", True)
    if holds_history(model) and (main or shards is not None):  # of a tensor parallel model every rank has a part
        write_history(model, save_directory)
    if not main or (shards is not None and shards.rank > 0):
        return
    apart = Path(save_directory, SETTINGS)
    apart.unlink(missing_ok=True)  # of an earlier save
    if not quantization_config:
        noted = {**settings.to_dict(), WEIGHTS: weights_fingerprint(save_directory)}
        apart.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")


SHADOWED["save_pretrained"] = save_pretrained
