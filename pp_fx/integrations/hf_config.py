"""A pruning configuration as transformers passes it around, and the files that it lies in."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..calibration.history_file import HISTORY_FILE
from ..config import ProbePruningConfig, as_config
from ..errors import ConfigError, InputError

METHOD = "pp_fx"
SETTINGS = "pp_fx_config.json"
"""Holds the pruning's configuration where config.json is to be that of the dense model."""
WEIGHTS = "weights"
"""Field of that file: `weights_fingerprint`."""
_END = 2**20


class ProbePruningHfConfig(QuantizationConfigMixin):
    """A ProbePruningConfig as transformers passes it around.

    `from_pretrained(dense, quantization_config=ProbePruningHfConfig(config))` loads and transforms.

    Args:
        config: what to prune; or its fields as keywords, as config.json holds them.
        history_file: whether the folder holds a history.
        quantization: how the weights are quantized: transformers' configuration of a method whose weights can be pruned
            (`TorchAoConfig`), or its dict. None for a model that is not.

    Raises:
        ConfigError: a field is unknown or has a wrong value.
    """

    def __init__(
        self,
        config: ProbePruningConfig | dict | None = None,
        *,
        quant_method: str = METHOD,
        history_file: bool = False,
        quantization: QuantizationConfigMixin | dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        if config is not None and fields:
            raise ConfigError(f"config and {', '.join(sorted(fields))} exclude each other; give one of them")
        if not isinstance(history_file, bool):
            raise ConfigError(f"history_file={history_file!r} is not a boolean; give True or False")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.config = as_config(fields if config is None else config)
        self.history_file = history_file
        within = AutoQuantizationConfig.from_dict(quantization) if isinstance(quantization, dict) else quantization
        if isinstance(within, ProbePruningHfConfig) or not isinstance(within, QuantizationConfigMixin | None):
            raise ConfigError(
                f"quantization={type(within).__name__} quantizes nothing; give transformers' TorchAoConfig, or None"
            )
        self.quantization: QuantizationConfigMixin | None = within

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> ProbePruningHfConfig:
        """Of a folder or hub id that was saved with `save_pretrained(.., quantization_config=False)`.

        Args:
            name: folder or hub id.
            **kwargs: of transformers' `cached_file` (revision, subfolder, token, ..).

        Raises:
            InputError: there is no pp_fx_config.json.
            ConfigError: it cannot be read, or a field is unknown or has a wrong value.
        """
        found = cls.find(name, **kwargs)
        if found is None:
            raise InputError(
                f"name={str(name)!r} has no {SETTINGS}; give a folder of save_pretrained(.., quantization_config=False)"
            )
        return found

    @classmethod
    def find(cls, name: str | Path, **kwargs: Any) -> ProbePruningHfConfig | None:
        """As `from_pretrained`, None where there is no such file."""
        quiet = ("missing_entries", "connection_errors", "gated_repo")
        path = cached_file(str(name), SETTINGS, **{f"_raise_exceptions_for_{q}": False for q in quiet}, **kwargs)
        if path is None:
            return None
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            noted = fields.pop(WEIGHTS, None)
            found = cls(**fields)
        except ConfigError:
            raise
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); save the model again") from None
        if noted is not None and weights_fingerprint(Path(path).parent) not in (None, noted):
            raise ConfigError(
                f"{path} belongs to other weights than those beside it (a model was saved over a pruned one?); delete "
                f"it and {HISTORY_FILE}, or save the pruned model again"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON types: the method, and every field of the configuration."""
        within = {} if self.quantization is None else {"quantization": self.quantization.to_dict()}
        return {"quant_method": METHOD, "history_file": self.history_file, **within, **self.config.to_dict()}


def saved_settings(config: Any) -> ProbePruningConfig | None:
    """The pruning that a model was saved with, by its transformers configuration; None for a dense model.

    Raises:
        ConfigError: a field is unknown or has a wrong value.
    """
    saved = getattr(config, "quantization_config", None)
    if isinstance(saved, dict) and saved.get("quant_method") == METHOD:
        saved = ProbePruningHfConfig(**saved)
    return saved.config if isinstance(saved, ProbePruningHfConfig) else None


def weights_fingerprint(directory: str | os.PathLike) -> str | None:
    """Of the names, sizes and ends of a folder's weight files, a few MB to read; None where there are none.

    A dense model that is saved over a pruned one later leaves `pp_fx_config.json` behind: it must not prune that one.
    """
    files = sorted(p for p in Path(directory).glob("*.safetensors") if p.name != HISTORY_FILE)
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size}".encode())
            for start in (0, max(0, size - _END)):
                file.seek(start)
                digest.update(file.read(_END))
    return digest.hexdigest() if files else None
