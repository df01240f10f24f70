"""`from_pretrained` gives back a pruned model: transformers' plug-in point for methods that live outside of it.

https://huggingface.co/docs/transformers/quantization/contribute. The method is no quantization; the plug-in point is
the one at which a configuration in config.json changes the model that is loaded. Registered by `import pp_fx`.
config.json has room for one method, so the one that quantizes the weights is nested in ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers import AutoHfQuantizer, HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.utils import cached_file

from ..calibration.history_file import HISTORY_FILE, read_history
from ..errors import StateError
from ..rewrite.transform import transform
from .hf_config import METHOD, ProbePruningHfConfig


class _Pruning:
    """Transforms a model when its weights are in place, and reads its history; in front of an HfQuantizer."""

    pruning: ProbePruningHfConfig
    folder: Path | None = None
    """Where the weights lie: the history lies beside them."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        self.folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)  # type: ignore[misc]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]
        if self.pruning.quantization is None:
            self.remove_quantization_config(model)  # type: ignore[attr-defined]
            for module in model.modules():
                if hasattr(getattr(module, "config", None), "_is_quantized"):
                    del module.config._is_quantized
        transform(model, self.pruning.config)
        if self.pruning.history_file:
            path = _history_path(model.config, self.folder)
            if path is None:
                raise StateError(
                    f"{model.config._name_or_path} has no {HISTORY_FILE}; copy the whole folder, or set "
                    "'history_file': false in config.json to start without a history"
                )
            read_history(model, path)
        return model


class ProbePruningHfQuantizer(_Pruning, HfQuantizer):
    """What transformers makes of a `ProbePruningHfConfig`; of one with a quantization, that one's, pruning as well."""

    requires_calibration = False

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        within = quantization_config.quantization
        if within is None:
            return super().__new__(cls)
        inner = type(AutoHfQuantizer.from_config(within, **kwargs))
        made: Any = type(f"Pruning{inner.__name__}", (_Pruning, inner), {})(within, **kwargs)
        made.pruning = quantization_config
        return made  # of another class, so that Python leaves it as it is

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pruning = quantization_config

    def is_serializable(self) -> bool:
        """Saving is `saving.save_pretrained`'s."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Only as far as the model is: pruning passes gradients to what ran."""
        return False


def _history_path(config: Any, folder: Path | None) -> Path | str | None:
    """The history beside the weights, downloaded if need be; None where there is none."""
    if folder is not None and Path(folder, HISTORY_FILE).is_file():
        return folder / HISTORY_FILE
    where: dict[str, Any] = {"revision": getattr(config, "_commit_hash", None)}
    if folder is not None and "snapshots" in folder.parts[:-1]:  # CACHE/models--NAME/snapshots/COMMIT/SUBFOLDER
        at = len(folder.parts) - 2 - folder.parts[-2::-1].index("snapshots")
        cache, commit, inner = folder.parts[: at - 1], folder.parts[at + 1], folder.parts[at + 2 :]
        where = {"cache_dir": Path(*cache), "revision": commit, "subfolder": "/".join(inner)}
    return cached_file(config._name_or_path, HISTORY_FILE, _raise_exceptions_for_missing_entries=False, **where)


def register() -> None:
    """Make transformers know the method, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(ProbePruningHfConfig)
        register_quantizer(METHOD)(ProbePruningHfQuantizer)
