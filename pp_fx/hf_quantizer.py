"""`from_pretrained` gives back a pruned model: transformers' plug-in point for methods that live outside of it.

https://huggingface.co/docs/transformers/quantization/contribute. The method is no quantization; the plug-in point is
the one at which a configuration in config.json changes the model that is loaded. Registered by `import pp_fx`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from .config import ProbePruningConfig, as_config
from .errors import ConfigError, InputError, StateError
from .saving import HISTORY, SETTINGS, WEIGHTS, read_history, weights_fingerprint
from .transform import transform

METHOD = "pp_fx"


class ProbePruningHfConfig(QuantizationConfigMixin):
    """A ProbePruningConfig as transformers passes it around.

    `from_pretrained(dense, quantization_config=ProbePruningHfConfig(config))` loads and transforms.

    Args:
        config: what to prune; or its fields as keywords, as config.json holds them.
        history_file: whether the folder holds a history.

    Raises:
        ConfigError: a field is unknown or has a wrong value.
    """

    def __init__(
        self,
        config: ProbePruningConfig | dict | None = None,
        *,
        quant_method: str = METHOD,
        history_file: bool = False,
        **fields: Any,
    ) -> None:
        if config is not None and fields:
            raise ConfigError(f"config and {', '.join(sorted(fields))} exclude each other; give one of them")
        if not isinstance(history_file, bool):
            raise ConfigError(f"history_file={history_file!r} is not a boolean; give True or False")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.config = as_config(fields if config is None else config)
        self.history_file = history_file

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
                f"it and {HISTORY}, or save the pruned model again"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON types: the method, and every field of the configuration."""
        return {"quant_method": METHOD, "history_file": self.history_file, **self.config.to_dict()}


def saved_settings(config: Any) -> ProbePruningConfig | None:
    """The pruning that a model was saved with, by its transformers configuration; None for a dense model.

    Raises:
        ConfigError: a field is unknown or has a wrong value.
    """
    saved = getattr(config, "quantization_config", None)
    if isinstance(saved, dict) and saved.get("quant_method") == METHOD:
        saved = ProbePruningHfConfig(**saved)
    return saved.config if isinstance(saved, ProbePruningHfConfig) else None


class ProbePruningHfQuantizer(HfQuantizer):
    """Transforms a model when its weights are in place, and reads its history."""

    requires_calibration = False
    folder: Path | None = None
    """Where the weights lie: the history lies beside them."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        self.folder = Path(checkpoint_files[0]).parent if checkpoint_files else None

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        settings: Any = self.quantization_config
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized
        transform(model, settings.config)
        if settings.history_file:
            path = _history_path(model.config, self.folder)
            if path is None:
                raise StateError(
                    f"{model.config._name_or_path} has no {HISTORY}; copy the whole folder, or set "
                    "'history_file': false in config.json to start without a history"
                )
            read_history(model, path)
        return model

    def is_serializable(self) -> bool:
        """Saving is `pp_fx.saving`'s."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Only as far as the model is: pruning passes gradients to what ran."""
        return False


def _history_path(config: Any, folder: Path | None) -> Path | str | None:
    """The history beside the weights, downloaded if need be; None where there is none."""
    if folder is not None and Path(folder, HISTORY).is_file():
        return folder / HISTORY
    where: dict[str, Any] = {"revision": getattr(config, "_commit_hash", None)}
    if folder is not None and "snapshots" in folder.parts[:-1]:  # CACHE/models--NAME/snapshots/COMMIT/SUBFOLDER
        at = len(folder.parts) - 2 - folder.parts[-2::-1].index("snapshots")
        cache, commit, inner = folder.parts[: at - 1], folder.parts[at + 1], folder.parts[at + 2 :]
        where = {"cache_dir": Path(*cache), "revision": commit, "subfolder": "/".join(inner)}
    return cached_file(config._name_or_path, HISTORY, _raise_exceptions_for_missing_entries=False, **where)


def register() -> None:
    """Make transformers know the method, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(ProbePruningHfConfig)
        register_quantizer(METHOD)(ProbePruningHfQuantizer)
