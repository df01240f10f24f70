"""What to prune and how: one frozen, validated configuration with a JSON round trip."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from .checks import check_choice, check_flag, check_integers, check_number
from .devices import defaults
from .errors import ConfigError
from .methods import COMPENSATIONS, METHODS, SCORES, Method
from .methods.compensations import CompensationName
from .probe_config import ProbeConfig

VERSION = 1
LARGEST_RATIO = 0.95
"""Largest share of a layer that may be dropped."""
LATE_RATIO = 0.6
"""What the MLP of each late layer drops where `skip_layers` is left open."""
HistoryKind = Literal["channel", "position"]
DecodeMode = Literal["sticky", "dense", "probe", "step", "auto", "rolling"]
StepProbe = Literal["int8", "int4"]
Kind = Literal["mlp", "attention"]
"""Of a group: the channels of an MLP, or the query heads of an attention."""


_number = functools.partial(check_number, error=ConfigError)
_choice = functools.partial(check_choice, error=ConfigError)
_flag = functools.partial(check_flag, error=ConfigError)


def _ratio(name: str, value: Any) -> None:
    if not isinstance(value, tuple):
        _number(name, value, 0, 1, high_open=True)
        return
    if not value:
        raise ConfigError(f"{name}=() names no layer; give one ratio for each layer, or a number")
    for index, one in enumerate(value):
        _number(f"{name}[{index}]", one, 0, LARGEST_RATIO)


class KindSettings(NamedTuple):
    """The fields of `ProbePruningConfig` that the two kinds of groups have each."""

    score: str
    compensation: CompensationName | None


@dataclass(frozen=True)
class ProbePruningConfig:
    """Settings of Probe Pruning (Le et al., ICLR 2025, arXiv 2502.15618).

    Args:
        mlp_ratio: share of MLP channels dropped, in [0, 1), mean over all layers: the layers after `skip_layers`
            carry `mlp_ratio * L / (L - skip_layers)`, which must not exceed 0.95. Or a tuple with the ratio of every
            layer, in [0, 0.95] (see `pp_fx.allocate`).
        attention_ratio: share of query heads dropped, likewise. Keys, values and the KV cache stay whole.
        skip_layers: the first so many layers stay dense where a ratio is one number: what they change is read by all
            later layers, and through their keys and values by all later tokens (docs/research/prompt.md). None: of
            heads 3; of MLPs so many that the others drop 60% each (at `mlp_ratio=0.2` two thirds), at least 3. Half of
            fewer than 6 layers. A text that is only scored loses less with `skip_layers=3`.
        round_to: kept MLP channels are rounded up to a multiple of it (at most all). Dropped heads are rounded down.
            None: what suits the model's device (`pp_fx.devices`): 16 on a CPU, 64 on CUDA.
        ratio_digits: round the per-layer ratio to so many digits (the authors: 2); None keeps it exact.
        probe: which rows run ahead; None: none, the units are chosen by the calibrated history alone (static).
        history: keep running statistics per "channel", per "position" and channel, or None (probe alone).
        history_length: rows of the "position" history; later positions share its last row.
        history_rows: the "channel" history is updated from at most so many rows of a batch, evenly spaced.
        momentum: of the history's moving average, in [0, 1].
        freeze_history: never update the history after calibration.
        fusion_epsilon: added to the denominator of the importance-scaled fusion (the authors: 1e-6).
        score: of a channel, by its name in `pp_fx.methods`: "ppsp" (paper), "wanda_sp", "flap", "griffin",
            "magnitude" or "random".
        attention_score: of a head: "joint" (the output error of all dropped heads together), a name of `score`, or
            None: the same as `score`.
        mlp_compensation: what stands in for the dropped channels, by its name in `pp_fx.methods.compensations`: "mean",
            "least_squares" or None.
        attention_compensation: likewise for the dropped heads.
        compensation_mix: share of the history (against the probe) in the moments that a compensation uses, in [0, 1].
        compensation_rank: principal directions of the intermediate state that "least_squares" keeps from calibration.
        compensation_rows: probe rows, at most, that "least_squares" and the "joint" head score read.
        compensation_ridge: share of the mean variance of the kept channels that "least_squares" adds to each of them.
        compensation_min_tokens: a selection for fewer tokens (B x T) takes "mean" in place of "least_squares", whose
            cost does not fall with the number of tokens: there a smaller ratio buys more quality for the same time.
            None: what suits the model's device (`pp_fx.devices`): 2048 on a CPU, 49152 on CUDA.
        min_select_tokens: a call of at least so many tokens selects anew; a shorter one on a KV cache that holds a
            selection is decoding. A prompt that is shorter still selects: by the history alone after `calibrate`
            (a probe would cost more than its share), else by its probe.
        decode: "sticky" (decoding reuses the prompt's selection), "dense" (decoding runs all channels), "probe"
            (the MLP's channels are selected anew after every `reprobe_every` decoded tokens, from these tokens;
            attention heads stay), "step" (every token of a decode step chooses the MLP's channels for itself, by its
            own gate; attention heads run whole), "auto" ("step" for batches of at most `step_batch`, whose choices
            have enough in common to save time, else "dense") or "rolling" (as "probe"; with probe=None, which has
            nothing to probe, as "sticky"). In an engine with continuous batching, which takes "auto" for "dense",
            "rolling" is one selection for all tokens that decode (docs/serving.md).
        step_batch: of decode="auto", in sequences (beams count). None: what suits the model's device
            (`pp_fx.devices`).
        step_probe: a copy of the gate projection in 8 or 4 bits that ranks the channels of decode="step" in its place
            ("int8", "int4"; then the gate reads the chosen channels alone), or None: the gate ranks, whole. For a CPU;
            an MLP without a gate ranks by all of its inputs in any case.
        decode_ratio: share of the MLP's channels that decode="step" leaves out for each token, in [0, 0.95]: in every
            layer, `skip_layers` or not, or a tuple with the ratio of every layer. None: the same as `mlp_ratio`.
        reprobe_every: decoded tokens (in an engine: steps with tokens that decode) between two probes of decode="probe"
            or "rolling" or `drift_threshold`; a window of so many tokens' residual is kept with the selection.
        drift_threshold: in (0, 1], with decode="sticky" or "rolling": every `reprobe_every` decoded tokens these are
            probed, and where less than this share of their selection is in the present one, it replaces it. None:
            the selection of "sticky" stays, that of "rolling" is always replaced.
        compact_megabytes: at most so many MiB of compact weights for each generation (layers from the first on); the
            other layers gather at every step. None: no limit; 0: keep only the indices.
        guard: calls of too few tokens (B x T) for pruning to pay stay dense, layer by layer; `explain` reports how many
            that are. None: by a cost model with constants for the kind of device (`pp_fx.rewrite.cost_model`; none for
            CUDA, small or quantized layers, which prune every call), so that every machine computes the same; a call
            whose selection decoding reuses is pruned at any size. True: measured at `transform` (and after loading) on
            this machine, uncompiled. False: every call is pruned.
        kernel_rows: calls of at most so many rows (B x T) multiply with the kept rows where they lie in place of
            copying them (Triton on CUDA; `benchmarks/gpu.py` measures up to how many rows that is faster). 0: never.
        version: of this schema.

    Raises:
        pp_fx.errors.ConfigError: a field has a wrong type or value.
    """

    mlp_ratio: float | tuple[float, ...] = 0.2
    attention_ratio: float | tuple[float, ...] = 0.0
    skip_layers: int | None = None
    round_to: int | None = None
    ratio_digits: int | None = None
    probe: ProbeConfig | None = field(default_factory=ProbeConfig)
    history: HistoryKind | None = "channel"
    history_length: int = 512
    history_rows: int = 256
    momentum: float = 0.99
    freeze_history: bool = False
    fusion_epsilon: float = 0.0
    score: str = "ppsp"
    attention_score: str | None = "joint"
    mlp_compensation: CompensationName | None = "least_squares"
    attention_compensation: CompensationName | None = "mean"
    compensation_mix: float = 0.5
    compensation_rank: int = 64
    compensation_rows: int = 256
    compensation_ridge: float = 0.1
    compensation_min_tokens: int | None = None
    min_select_tokens: int = 32
    decode: DecodeMode = "auto"
    decode_ratio: float | tuple[float, ...] | None = None
    step_batch: int | None = None
    step_probe: StepProbe | None = None
    reprobe_every: int = 32
    drift_threshold: float | None = None
    compact_megabytes: float | None = None
    guard: bool | None = None
    kernel_rows: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        _ratio("mlp_ratio", self.mlp_ratio)
        _ratio("attention_ratio", self.attention_ratio)
        if self.skip_layers is not None:
            check_integers(0, ConfigError, skip_layers=self.skip_layers)
        for name in ("round_to", "ratio_digits", "compensation_min_tokens", "step_batch"):
            if getattr(self, name) is not None:
                check_integers(0 if name == "step_batch" else 1, ConfigError, **{name: getattr(self, name)})
        if not isinstance(self.probe, ProbeConfig | None):
            raise ConfigError(f"probe={self.probe!r} is not a ProbeConfig; give pp_fx.ProbeConfig(...) or None")
        _choice("history", self.history, (*get_args(HistoryKind), None))
        check_integers(1, ConfigError, history_length=self.history_length)
        check_integers(1, ConfigError, history_rows=self.history_rows)
        _number("momentum", self.momentum, 0, 1)
        _flag("freeze_history", self.freeze_history)
        _number("fusion_epsilon", self.fusion_epsilon, 0, 1)
        _choice("score", self.score, tuple(name for name, score in SCORES.items() if not score.gram))
        _choice("attention_score", self.attention_score, (*SCORES, None))
        _choice("mlp_compensation", self.mlp_compensation, (*COMPENSATIONS, None))
        _choice("attention_compensation", self.attention_compensation, (*COMPENSATIONS, None))
        _number("compensation_mix", self.compensation_mix, 0, 1)
        for name in ("compensation_rank", "compensation_rows"):
            check_integers(1, ConfigError, **{name: getattr(self, name)})
        _number("compensation_ridge", self.compensation_ridge, 1e-6, math.inf)
        check_integers(1, ConfigError, min_select_tokens=self.min_select_tokens)
        _choice("decode", self.decode, get_args(DecodeMode))
        _choice("step_probe", self.step_probe, (*get_args(StepProbe), None))
        if self.step_probe is not None and not self.steps:
            raise ConfigError(
                f"step_probe={self.step_probe!r} has no meaning with decode={self.decode!r}; leave it None or choose "
                "decode='step' or 'auto'"
            )
        if self.decode_ratio is not None:
            _ratio("decode_ratio", self.decode_ratio)
            if not isinstance(self.decode_ratio, tuple):
                _number("decode_ratio", self.decode_ratio, 0, LARGEST_RATIO)
            if not self.steps:
                raise ConfigError(
                    f"decode_ratio={self.decode_ratio} has no meaning with decode={self.decode!r}, which has no ratio "
                    "of its own; leave it None or choose decode='step' or 'auto'"
                )
        check_integers(1, ConfigError, reprobe_every=self.reprobe_every)
        if self.drift_threshold is not None:
            _number("drift_threshold", self.drift_threshold, 0, 1)
            if self.decode not in ("sticky", "rolling"):
                raise ConfigError(
                    f"drift_threshold={self.drift_threshold} has no meaning with decode={self.decode!r}; leave it None "
                    "or choose decode='sticky' or 'rolling'"
                )
        if self.guard is not None:
            _flag("guard", self.guard)
        check_integers(0, ConfigError, kernel_rows=self.kernel_rows)
        if self.compact_megabytes is not None:
            _number("compact_megabytes", self.compact_megabytes, 0, math.inf)
        if self.reprobes and self.history == "position":
            raise ConfigError(
                "history='position' cannot serve re-probes while decoding, whose rows have no position of their own; "
                "choose history='channel' or None, or decode='sticky' without drift_threshold"
            )
        if self.probe is None and (self.history is None or self.reprobes):
            raise ConfigError(
                "probe=None selects by the history alone, once and for all: it needs history='channel' or 'position', "
                "and decode='probe' or drift_threshold would have nothing to probe; change one of them"
            )
        if self.probe is None and self.guard:
            raise ConfigError(
                "guard=True measures what deciding costs, and probe=None decides nothing while it runs; set guard=False"
            )
        if self.version != VERSION or isinstance(self.version, bool):
            raise ConfigError(f"version={self.version!r} is unknown; this pp_fx reads version {VERSION}")

    @classmethod
    def paper(cls, ratio: float = 0.4, attention_ratio: float | None = None, **changes: Any) -> ProbePruningConfig:
        """The authors' settings (arXiv 2502.15618, section 4, and their published code).

        Args:
            ratio: share of MLP channels, and of attention heads unless `attention_ratio` is given.
            attention_ratio: share of attention heads.
            **changes: any other field, for example `round_to=1`.
        """
        heads = ratio if attention_ratio is None else attention_ratio
        made: ProbePruningConfig = METHODS["paper"].config(ratio, heads, **{"round_to": 64, **changes})
        return made

    @classmethod
    def preset(
        cls, name: str, mlp_ratio: float | None = None, attention_ratio: float | None = None, **changes: Any
    ) -> ProbePruningConfig:
        """The settings of a pruning method, as `pp-fx --preset` takes them.

        Args:
            name: of `pp_fx.methods.METHODS`: "default", "wanda_sp", "flap", ..; "paper" is `paper()`, with its heads
                and its `round_to`, which `METHODS["paper"].config()` leaves alone for comparisons.
            mlp_ratio: as above; None: 0.2, of "paper" 0.4. A method with a planner (flap) spreads it over the layers
                where it plans (`pp_fx.compare`); as it stands here all layers share it.
            attention_ratio: as above; None: 0, of "paper" as `mlp_ratio`.
            **changes: any other field.

        Raises:
            ConfigError: an unknown name, or a field is unknown or invalid.
        """
        _choice("preset", name, METHODS)
        if name == "paper":
            return cls.paper(0.4 if mlp_ratio is None else mlp_ratio, attention_ratio, **changes)
        made: ProbePruningConfig = METHODS[name].config(mlp_ratio, attention_ratio or 0.0, **changes)
        return made

    def layer_ratios(self, name: str, layers: int) -> list[float]:
        """The ratio that each layer carries.

        Args:
            name: "mlp_ratio", "attention_ratio" or "decode_ratio".
            layers: number of decoder layers L.

        Raises:
            ConfigError: more than 0.95 of a layer would be dropped, no layer is left to prune, or a tuple of ratios
                belongs to another number of layers.
        """
        ratio = getattr(self, name)
        if ratio is None:
            ratio = self.mlp_ratio
        if isinstance(ratio, tuple):
            if len(ratio) != layers:
                raise ConfigError(f"{name} names {len(ratio)} layers, the model has {layers}; give one ratio for each")
            return list(ratio)
        if ratio == 0 or name == "decode_ratio":
            return [float(ratio)] * layers
        skip = self.skip_layers
        if skip is None:
            skip = min(3, layers // 2)
            if name == "mlp_ratio":
                skip = max(skip, min(math.floor(layers * (1 - ratio / LATE_RATIO) + 1e-9), 2 * layers // 3))
        if skip >= layers:
            raise ConfigError(f"skip_layers={skip} leaves nothing to prune in a model of {layers} layers; lower it")
        carried = ratio * layers / (layers - skip)
        if self.ratio_digits is not None:
            carried = round(carried, self.ratio_digits)
        if carried > LARGEST_RATIO:
            raise ConfigError(
                f"{name}={ratio} with skip_layers={skip} drops {carried:.2f} of each of the other "
                f"{layers - skip} layers, more than {LARGEST_RATIO}; lower {name} or skip_layers"
            )
        return [0.0] * skip + [carried] * (layers - skip)

    def on(self, device: str) -> ProbePruningConfig:
        """The configuration with a value for everything that it leaves to the device.

        Args:
            device: its type, for example "cuda".
        """
        open_ = {name: value for name, value in defaults(device)._asdict().items() if getattr(self, name) is None}
        return dataclasses.replace(self, **open_) if open_ else self

    def of_kind(self, kind: Kind) -> KindSettings:
        """What holds for the groups of one kind."""
        if kind == "mlp":
            return KindSettings(self.score, self.mlp_compensation)
        return KindSettings(self.attention_score or self.score, self.attention_compensation)

    @property
    def steps(self) -> bool:
        """Whether tokens of decode steps choose for themselves."""
        return self.decode in ("step", "auto")

    @property
    def reuses(self) -> bool:
        """Whether decoding reuses what a prompt selects."""
        return self.decode in ("sticky", "probe", "rolling")

    @property
    def reprobes(self) -> bool:
        """Whether decoding probes again."""
        rolls = self.decode == "rolling" and self.probe is not None
        return self.decode == "probe" or rolls or self.drift_threshold is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON types."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The configuration as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Any) -> ProbePruningConfig:
        """Inverse of `to_dict`; fields left out take their defaults.

        Raises:
            ConfigError: not a dict, unknown fields, another version, or an invalid value.
        """
        data = dict(_known(cls, data, "configuration"))
        if "version" in data and data["version"] != VERSION:
            raise ConfigError(f"version={data['version']!r} is unknown; this pp_fx reads version {VERSION}")
        for name in ("mlp_ratio", "attention_ratio", "decode_ratio"):
            if isinstance(data.get(name), list):  # JSON has no tuples
                data[name] = tuple(data[name])
        if data.get("probe") is not None and not isinstance(data["probe"], ProbeConfig):
            data["probe"] = ProbeConfig(**_known(ProbeConfig, data["probe"], "probe"))
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> ProbePruningConfig:
        """Inverse of `to_json`.

        Raises:
            ConfigError: as `from_dict`, or the text is not JSON.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the configuration is not JSON ({error}); see ProbePruningConfig().to_json()") from None
        return cls.from_dict(data)


Method.configure = ProbePruningConfig.from_dict


def as_config(config: Any) -> ProbePruningConfig:
    """What a `config` argument means: None the default, a dict the fields of `ProbePruningConfig.from_dict`.

    Raises:
        ConfigError: it is none of these, or a field is invalid.
    """
    if config is None:
        return ProbePruningConfig()
    if isinstance(config, dict):
        return ProbePruningConfig.from_dict(config)
    if not isinstance(config, ProbePruningConfig):
        raise ConfigError(f"config={config!r} is not a ProbePruningConfig; give one, a dict or None")
    return config


def _known(cls: type, data: Any, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(f"{what}={data!r} is not a mapping; give a dict of the fields of {cls.__name__}")
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(str(k) for k in data if k not in names)
    if unknown:
        raise ConfigError(f"{what} has unknown keys {', '.join(unknown)}; known are {', '.join(names)}")
    return data
