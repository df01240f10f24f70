"""vLLM's configuration of the method `pp_fx`: which linear layers belong to which MLP, and their history."""

from __future__ import annotations

import math
import re
from typing import Any, get_args

import torch
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import cached_file
from vllm.config import CompilationMode, get_current_vllm_config
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from ...calibration.history_file import HISTORY_FILE, load_states
from ...config import Kind, ProbePruningConfig
from ...errors import StateError, UnsupportedModelError
from ...runtime.engine_step import by_history, check_settings
from ...runtime.state import HISTORY_BUFFERS
from ..hf_config import METHOD, SETTINGS, ProbePruningHfConfig
from .linears import DownMethod, GateUpMethod
from .mlp import PrunedMlp
from .operators import OPERATORS
from .quantized import inner_config
from .refusals import check_engine, check_version
from .steps import Steps

_HISTORY = re.compile(rf"^\d+\.({'|'.join(get_args(Kind))})\.({'|'.join(HISTORY_BUFFERS)})$")
"""Names of tensors in a history file."""
_ENGINE = ("vLLM", " in config.json")
"""For messages."""


class PpFxConfig(QuantizationConfig):
    """What vLLM makes of `quantization="pp_fx"` and of a folder that `save_pretrained` wrote.

    Args:
        given: the settings; None: those of `pp_fx_config.json` beside the weights, or the default.

    Attributes:
        steps: how often the engine pruned.
        mlps: name of a module -> its `PrunedMlp`.

    Raises:
        ConfigError, RequirementError: what was asked for cannot be served (`refusals`).
    """

    def __init__(self, given: ProbePruningHfConfig | None = None) -> None:
        self._inner: QuantizationConfig | None = None
        super().__init__()
        check_version()
        if given is not None:
            check_settings(given.config, *_ENGINE)
            self._inner = inner_config(given.quantization)
        self.given = given
        self.mlps: dict[str, PrunedMlp] = {}
        self._engine: Any = None
        self._last: int | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PpFxConfig:
        """Of `quantization_config` in config.json or `hf_overrides`: fields of ProbePruningHfConfig.

        Those of another method are of quantized weights, whose pruning's settings lie beside them, or are the default.
        """
        if config.get("quant_method", METHOD) == METHOD:
            return cls(ProbePruningHfConfig(**config))
        made = cls()
        made._inner = inner_config(AutoQuantizationConfig.from_dict(config))
        return made

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """`quantization="pp_fx"` goes together with weights that another method has quantized."""
        return METHOD if user_quant == METHOD else None

    @property
    def packed_modules_mapping(self) -> dict[str, list[str]]:
        """vLLM's merged layers and what a checkpoint calls their parts; the inner method matches names by it."""
        return self._packed

    @packed_modules_mapping.setter
    def packed_modules_mapping(self, mapping: dict[str, list[str]]) -> None:
        self._packed = mapping
        if self._inner is not None:
            self._inner.packed_modules_mapping = mapping

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Names of the inner method's modules as vLLM has them."""
        if self._inner is not None:
            self._inner.apply_vllm_mapper(hf_to_vllm_mapper)

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None that must be there."""
        return []

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """The history lies beside the weights, in a file of their format: none of its tensors is a weight."""
        return WeightsMapper(orig_to_new_regex={_HISTORY: None})

    def get_name(self) -> str:
        """Of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of the statistics' inputs."""
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """What runs a linear layer; None for other layers, which are vLLM's own.

        Raises:
            UnsupportedModelError: a layer that is to be pruned has no gated MLP, or experts.
        """
        if isinstance(layer, RoutedExperts):
            raise UnsupportedModelError(f"{prefix} routes to experts, which are not pruned; leave quantization out")
        if self._engine is None:
            self._begin(get_current_vllm_config())
        own = None if self._inner is None else self._inner.get_quant_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return own
        own = own or UnquantizedLinearMethod()
        index = next((int(part) for part in prefix.split(".") if part.isdigit()), None)
        if index is None or not (self.ratios[index] or self.stepped[index]):
            return own
        if self._last not in (None, index):
            self._check_found(self._last)  # type: ignore[arg-type]
        self._last = index
        parent = prefix.rpartition(".")[0]
        if isinstance(layer, MergedColumnParallelLinear):
            return GateUpMethod(self._mlp(parent, index), own)
        if isinstance(layer, RowParallelLinear) and parent in self.mlps:
            return DownMethod(self.mlps[parent], own)
        return own

    def _begin(self, engine: Any) -> None:
        """The settings, checked against the model and the engine."""
        model = engine.model_config
        where = {"revision": model.revision, "cache_dir": engine.load_config.download_dir}
        if self.given is None:
            self.given = ProbePruningHfConfig.find(model.model, **where) or ProbePruningHfConfig()
            check_settings(self.given.config, *_ENGINE)
        check_engine(engine, self.given.config)
        if getattr(self._inner, "is_checkpoint_torchao_serialized", False):  # vLLM asks for the method by its name
            engine.load_config.safetensors_load_strategy = "torchao"
        self.settings: ProbePruningConfig = self.given.config.on(engine.device_config.device_type)
        text = model.hf_text_config
        self.ratios = self.settings.layer_ratios("mlp_ratio", text.num_hidden_layers)
        steps = self.settings.decode == "step"
        self.stepped = (
            self.settings.layer_ratios("decode_ratio", len(self.ratios)) if steps else [0.0] * len(self.ratios)
        )
        name = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", "silu")
        self._activation = get_act_and_mul_fn(name, compile_native=False)
        self._history = None
        if self.given.history_file:
            self._history = cached_file(model.model, HISTORY_FILE, _raise_exceptions_for_missing_entries=False, **where)
            if self._history is None:
                raise StateError(
                    f"{model.model} has no {HISTORY_FILE}; copy the whole folder, or set 'history_file': false in "
                    f"{SETTINGS} or config.json to start without a history"
                )
        if by_history(self.settings) and any(self.ratios) and self._history is None:
            raise StateError(
                "freeze_history=True and probe=None select by the history alone, and the model has none; calibrate it "
                "(pp_fx.calibrate), save it and serve that folder, or set freeze_history=False"
            )
        self.steps = Steps(self.settings)
        compilation = engine.compilation_config
        self._compiled = compilation.mode != CompilationMode.NONE
        if compilation.splitting_ops:
            compilation.splitting_ops += [name for name in OPERATORS if name not in compilation.splitting_ops]
        self._engine = engine

    def _mlp(self, name: str, index: int) -> PrunedMlp:
        """A new one, where operators find it by its name."""
        found = PrunedMlp(
            name, index, self.ratios[index], self.stepped[index], self.settings, self.steps, self._activation,
            self._compiled, self._loaded,
        )  # fmt: skip
        self.mlps[name] = self._engine.compilation_config.static_forward_context[name] = found
        return found

    def _check_found(self, index: int) -> None:
        """Raises:

        UnsupportedModelError: the layer has no MLP that can be pruned; nothing must stay dense in silence.
        """
        found = [mlp for mlp in self.mlps.values() if mlp.index == index]
        if len(found) != 1 or not found[0].hidden:
            raise UnsupportedModelError(
                f"layer {index} has {len(found)} pairs of a merged gate and up projection and an output projection, "
                "one is wanted: the MLP is not gated, or has experts; serve the model without quantization='pp_fx'"
            )

    def _loaded(self) -> None:
        """The weights of one more MLP are there; with the last one comes the history."""
        if not all(mlp.ready for mlp in self.mlps.values()):
            return
        for index, ratios in enumerate(zip(self.ratios, self.stepped, strict=True)):
            if any(ratios):
                self._check_found(index)
        states = {f"{mlp.index}.mlp": mlp.state for mlp in self.mlps.values() if mlp.state.prunes}
        parallel = self._engine.parallel_config
        if self._history is not None:
            load_states(states, self._history, (parallel.rank % parallel.tensor_parallel_size,
                                                parallel.tensor_parallel_size))  # fmt: skip
        if by_history(self.settings):
            for mlp in self.mlps.values():
                if mlp.state.prunes:
                    mlp.select_by_history()
        self._limit_compact()
        layers = len(self.ratios)
        kept = sum(mlp.state.kept_units / mlp.channels for mlp in self.mlps.values())
        self.steps.share = (layers - len(self.mlps) + kept) / layers

    def _limit_compact(self) -> None:
        """MLPs from the first layer on may hold compact weights, up to `compact_megabytes`."""
        left = math.inf if self.settings.compact_megabytes is None else self.settings.compact_megabytes * 2**20
        for mlp in self.mlps.values():
            size = mlp.compact_bytes
            mlp.state.holds_compact = mlp.state.holds_compact and size <= left
            left -= size if mlp.state.holds_compact else 0
