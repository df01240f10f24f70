"""From how many tokens on pruning a layer pays, by a model of costs: what `guard=None` goes by.

A call of T tokens (B x T) that decides for itself takes longer than a dense one by

    call + head * heads + byte * bytes + row * min(T, history rows) * kept + mac * probe rows * read

where `bytes` are those of the projections that the probe reads and of the kept rows and columns, which are copied,
`kept` the kept columns of the output projection, of which the history reads some rows, and `read` the MACs of one row
of the probe. It saves `mac` for every MAC of T tokens that is dropped. The constants were measured, once for a kind of
device and a size of numbers, and stand here (docs/research/speed.md, section 9): what a model computes must not depend
on the machine unasked. They are those of uncompiled calls and hold for compiled ones, too: both compute the same.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..config import Kind, ProbePruningConfig
from ..groups.group import Group
from ..layouts import is_plain
from ..runtime.names import LAYER
from ..shards import local

logger = logging.getLogger(__name__)


class Costs(NamedTuple):
    """Seconds on one thread.

    Attributes:
        call: of a group in every call: the operators that decide, uncompiled.
        head: for every query head: how the heads meet in the output, in which order they are dropped.
        byte: for every byte that the probe reads or that is copied.
        row: for every number of the state that the history reads, and for what narrower products lose.
        mac: for every MAC.
    """

    call: float
    head: float
    byte: float
    row: float
    mac: float


COSTS: Mapping[tuple[str, int], Costs] = {
    ("cpu", 2): Costs(call=1.4e-3, head=1.6e-4, byte=6.2e-11, row=7e-9, mac=1e-11),
    ("cpu", 4): Costs(call=1.4e-3, head=1.6e-4, byte=7e-11, row=9e-9, mac=2.1e-11),
}
"""Type of a device, bytes of a number -> its costs. Of other devices too little is known (docs/research/gpu.md)."""
SMALLEST = 2 * 2**20
"""Weights of a layer below which nothing was measured: it is pruned at every size. The smallest measured has 3.5M."""
LONGEST = 8192
"""Tokens up to which the sizes are tried."""
STEP = 8
"""Tokens between the sizes that are tried."""


def set_guard_by_model(layers: Iterable[Any], device: str) -> None:
    """Give every layer that prunes the number of tokens from which on that pays by the cost model.

    Warns of layers in which it never does.

    Args:
        layers: rewritten layers.
        device: type of the model's device.
    """
    never = []
    for index, layer in enumerate(layers):
        info = layer.__dict__[LAYER]
        groups, kept = layer.groups, {kind: s.kept_units for kind, s in layer.states().items()}
        info.guard_tokens = tokens_that_pay(layer, groups, kept, info.settings, device)
        if info.guard_tokens:
            logger.info("layer %d: calls of fewer than %s tokens stay dense", index, info.guard_tokens)
        if info.guard_tokens == math.inf:
            never.append(str(index))
    if never:
        warnings.warn(
            f"layers {', '.join(never)} stay dense: by the cost model deciding takes longer there than it saves, in "
            "calls of any size; drop more of them (mlp_ratio, skip_layers), lower probe.token_fraction, or set "
            "guard=False to prune every call",
            stacklevel=3,
        )


def tokens_that_pay(
    layer: nn.Module,
    groups: Mapping[Kind, Group],
    kept: Mapping[Kind, int],
    settings: ProbePruningConfig,
    device: str,
) -> float:
    """Tokens of a call (B x T) from which on a layer is pruned.

    Args:
        layer: with weights of any kind, also fake ones; of a tensor parallel model the shard counts.
        groups, kept: its groups, and how many units of each run.
        settings: with the device's values.
        device: type of its device.

    Returns:
        A multiple of `STEP`; infinity where pruning never pays; 0 where calls of every size are pruned: the guard is
        given, nothing is dropped or decided, or nothing like it was measured (small or quantized layers, other
        devices).
    """
    dropping = [(group, kept[kind]) for kind, group in groups.items() if kept[kind] < group.units]
    if settings.guard is not None or settings.probe is None or not dropping:
        return 0
    if sum(local(p).numel() for p in layer.parameters()) < SMALLEST:
        return 0
    paths = {p.path for group, _ in dropping for p in (*group.read, group.output)}
    weights: dict[str, Any] = {path: local(layer.get_parameter(path)) for path in paths}
    plain = all(is_plain(w) and w.ndim == 2 and w.dtype.is_floating_point for w in weights.values())
    costs = COSTS.get((device, max(w.dtype.itemsize for w in weights.values()))) if plain else None
    if costs is None:
        return 0
    sizes = [_sizes(group, units, weights) for group, units in dropping]
    tried = range(STEP, LONGEST + 1, STEP)
    return next((tokens for tokens in tried if _pays(sizes, tokens, settings, costs)), math.inf)


class _Sizes(NamedTuple):
    """Of a group.

    Attributes:
        heads: query heads; 0 of an MLP.
        bytes: that are read or copied.
        kept: columns of the output projection.
        read: MACs of one row of the probe.
        dropped: MACs of one token that are not run.
    """

    heads: int
    bytes: float
    kept: float
    read: float
    dropped: float


def _sizes(group: Group, kept: int, weights: Mapping[str, Any]) -> _Sizes:
    numbers = {path: weight.numel() for path, weight in weights.items()}
    read = sum(numbers[p.path] * p.share for p in group.read)
    dropped = sum(numbers[path] * (1 - group.kept_share(path, kept)) for path in group.weights)
    shrinking = sum(numbers[p.path] * p.share for p in (*group.inputs, group.output))
    touched = (read + shrinking - dropped) * weights[group.output.path].dtype.itemsize
    heads = group.units if group.kind == "attention" else 0
    return _Sizes(heads, touched, kept * group.width, read, dropped)


def _pays(sizes: Iterable[_Sizes], tokens: int, settings: ProbePruningConfig, costs: Costs) -> bool:
    """Whether a call of so many tokens saves what deciding costs."""
    probe: Any = settings.probe
    rows = max(min(tokens, probe.min_positions), tokens * probe.token_fraction * probe.sample_fraction)
    learnt = min(tokens, settings.history_rows)
    fixed = sum(costs.call + costs.head * s.heads + costs.byte * s.bytes for s in sizes)
    spent = fixed + sum(costs.row * learnt * s.kept + costs.mac * rows * s.read for s in sizes)
    return spent <= costs.mac * tokens * sum(s.dropped for s in sizes)
