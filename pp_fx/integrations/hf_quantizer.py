"""`from_pretrained` gives back a pruned model: transformers' plug-in point for methods that live outside of it.

https://huggingface.co/docs/transformers/quantization/contribute. The method is no quantization; the plug-in point is
the one at which a configuration in config.json changes the model that is loaded. Registered by `import pp_fx`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.utils import cached_file

from ..calibration.history_file import HISTORY_FILE, read_history
from ..errors import StateError
from ..rewrite.transform import transform
from .hf_config import METHOD, ProbePruningHfConfig


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
                    f"{model.config._name_or_path} has no {HISTORY_FILE}; copy the whole folder, or set "
                    "'history_file': false in config.json to start without a history"
                )
            read_history(model, path)
        return model

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
