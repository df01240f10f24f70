"""`explain`: what of a model is pruned where, and why not elsewhere; from a model or from its configuration alone."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.initialization import no_init_weights

from ..capture.layers import find_layers, structure_key
from ..checks import check_integers
from ..config import Kind, ProbePruningConfig, as_config
from ..errors import CaptureError, InputError, UnsupportedModelError
from ..groups.group import AttentionGroup, Group
from ..process_settings import own_defaults
from ..rewrite.cost_model import tokens_that_pay
from ..rewrite.layer import config_of, is_transformed, layers_of, settings_of
from ..rewrite.structures import find_structures
from ..rewrite.widths import carried_ratios, device_of, kept_units, on_device
from ..runtime.names import LAYER
from ..shards import check_whole
from .macs import Macs, layer_macs, running_units


@dataclass(frozen=True)
class GroupReport:
    """One channel group of one layer.

    Attributes:
        kind: "mlp" or "attention".
        inputs, output: paths of the projections, inside the layer.
        units, kept: channels or query heads in all, and how many run.
        kv_head: for every query head the key/value head that it reads; empty for an MLP.
    """

    kind: Kind
    inputs: tuple[str, ...]
    output: str
    units: int
    kept: int
    kv_head: tuple[int, ...]


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer: its groups, and the reasons why other branches stay dense. MACs are per token."""

    index: int
    groups: tuple[GroupReport, ...]
    dense: tuple[str, ...]
    macs: Macs


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` shows a table."""

    model: str
    config: dict[str, Any]
    batch: int
    length: int
    layers: tuple[LayerReport, ...]

    @property
    def macs(self) -> Macs:
        """Of all decoder blocks, per token."""
        return sum((layer.macs for layer in self.layers), Macs())

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON types."""
        return {**asdict(self), "macs": asdict(self.macs)}

    def table(self) -> Any:
        """A rich table: runs of equal layers in one row each."""
        from rich.table import Table

        macs = self.macs
        title = f"{self.model}: {macs.summary} of the block MACs"
        table = Table(title=f"{title} at {self.batch} x {self.length}")
        for column in ("layers", "group", "input projections", "output projection", "kept", "dense because"):
            table.add_column(column, overflow="fold")
        for first, last, layer in self._runs():
            name = str(first) if first == last else f"{first}-{last}"
            for group in layer.groups:
                what = "channels" if group.kind == "mlp" else f"heads on {len(set(group.kv_head))} key/value heads"
                kept = f"{group.kept} of {group.units} {what}"
                table.add_row(name, group.kind, ", ".join(group.inputs), group.output, kept, "")
                name = ""
            for reason in layer.dense:
                table.add_row(name, "", "", "", "", reason)
                name = ""
        return table

    def _runs(self) -> list[tuple[int, int, LayerReport]]:
        runs: list[tuple[int, int, LayerReport]] = []
        for layer in self.layers:
            if runs and (runs[-1][2].groups, runs[-1][2].dense) == (layer.groups, layer.dense):
                runs[-1] = (runs[-1][0], layer.index, layer)
            else:
                runs.append((layer.index, layer.index, layer))
        return runs

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, file=io.StringIO())
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]


@own_defaults()
def explain(
    model: nn.Module | PreTrainedConfig,
    config: ProbePruningConfig | dict | None = None,
    *,
    batch: int = 1,
    length: int = 512,
) -> Explanation:
    """Which channels and heads of which layers can be pruned, how many are kept, and why the rest stays dense.

    Nothing is changed. From a configuration alone no weights are made or downloaded: the layers are captured on fake
    tensors, in seconds for a model of any size.

    Args:
        model: a causal language model, transformed or not, or its transformers configuration.
        config: what to prune, as in `pp_fx.transform`; a transformed model has its own.
        batch: samples of the prefill for which the probe's MACs are counted.
        length: its tokens per sample.

    Raises:
        UnsupportedModelError: no decoder layers, or a layer that cannot be captured; the message names what broke.
        ConfigError: `config` does not fit the model.
        InputError: `batch` or `length` is no integer >= 1, or `config` is given for a transformed model.
    """
    check_integers(1, batch=batch, length=length)
    if isinstance(model, nn.Module) and is_transformed(model):
        if config is not None:
            raise InputError(
                "model is transformed, so its own configuration is explained; leave config out, or call "
                "pp_fx.restore(model) first"
            )
        return _of_transformed(model, batch, length)
    config = as_config(config)
    if isinstance(model, nn.Module):
        return _of_model(model, config, batch, length)
    try:
        return _of_model(_model_of(model, FakeTensorMode(allow_non_fake_inputs=True)), config, batch, length)
    except (CaptureError, DataDependentOutputException) as error:
        if not isinstance(error.__cause__ or error, DataDependentOutputException):
            raise
        # its masks depend on numbers: memory that nobody writes costs nothing
        return _of_model(_model_of(model, contextlib.nullcontext()), config, batch, length)


def _of_model(model: nn.Module, config: ProbePruningConfig, batch: int, length: int) -> Explanation:
    check_whole(model, "explain before transform")
    _, layers = find_layers(model)
    ratios, settings = carried_ratios(config, len(layers)), on_device(config, model)
    structures, _ = find_structures(model, layers, config)
    reports = []
    for index, layer in enumerate(layers):
        found = structures[structure_key(layer)]
        kept = {
            kind: kept_units(kind, group.units, ratios[kind][index], settings) for kind, group in found.groups.items()
        }
        fewest = tokens_that_pay(layer, found.groups, kept, settings, device_of(model))
        small = batch * length < fewest
        running = {kind: group.units for kind, group in found.groups.items()} if small else kept
        macs = layer_macs(layer, found.groups, running, settings, batch, length)
        reports.append(_report(index, found.groups, kept, [*found.reasons, *_guarded(fewest, settings)], macs))
    return Explanation(type(model).__name__, config.to_dict(), batch, length, tuple(reports))


def _of_transformed(model: nn.Module, batch: int, length: int) -> Explanation:
    config, settings = config_of(model), settings_of(model)
    reports = []
    for index, layer in enumerate(layers_of(model)):
        kept = {kind: state.kept_units for kind, state in layer.states().items()}
        macs = layer_macs(layer, layer.groups, running_units(layer, batch * length), settings, batch, length)
        guarded = _guarded(layer.__dict__[LAYER].guard_tokens, settings)
        reports.append(_report(index, layer.groups, kept, [*layer.reasons, *guarded], macs))
    return Explanation(type(model).__name__, config.to_dict(), batch, length, tuple(reports))


def _guarded(tokens: float, settings: ProbePruningConfig) -> list[str]:
    """What the guard keeps dense, in words."""
    if not tokens:
        return []
    uncached = " without a KV cache" if settings.guard is None and settings.reuses else ""
    size = "any size" if tokens == math.inf else f"fewer than {tokens} tokens"
    return [f"guard: calls of {size}{uncached}"]


def _report(
    index: int, groups: dict[Kind, Group], kept: dict[Kind, int], reasons: list[str], macs: Macs
) -> LayerReport:
    found = tuple(
        GroupReport(
            kind,
            tuple(dict.fromkeys(p.module for p in group.inputs)),
            group.output.module,
            group.units,
            kept[kind],
            group.kv_head if isinstance(group, AttentionGroup) else (),
        )
        for kind, group in groups.items()
    )
    return LayerReport(index, found, tuple(reasons), macs)


def _model_of(config: PreTrainedConfig, mode: Any) -> nn.Module:
    """A model whose weights are not set, of whichever class `from_pretrained` would make."""
    known = next((auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if _knows(auto, config)), None)
    if known is None:
        raise UnsupportedModelError(
            f"config={type(config).__name__} belongs to no causal and no image-text model; give the configuration of a "
            "decoder"
        )
    # initial values would be random numbers, which some initializers then look at
    with mode, no_init_weights():
        return known.from_config(config, dtype=torch.bfloat16).eval()


def _knows(auto: Any, config: PreTrainedConfig) -> bool:
    return type(config) in auto._model_mapping
