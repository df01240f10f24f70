"""`allocate`: spend a budget of multiply-accumulates, or of time, where the measured loss for each is lowest."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calibrate import calibrate
from ..checks import check_choice, check_list, check_number, check_token_ids
from ..config import LARGEST_RATIO, ProbePruningConfig, as_config
from ..errors import ConfigError, InputError, StateError
from ..progress import track
from ..rewrite.layer import is_transformed, layers_of
from ..rewrite.transform import restore, transform
from ..runtime.modes import history_frozen, put_back
from ..runtime.state import GroupState
from ..shards import check_whole
from .evaluate import evaluate
from .macs import count_macs, unit_macs

_GRID = (0.2, 0.4, 0.6, 0.8)
"""Ratios at which the loss of every group is measured; between them it is interpolated."""
_STEPS = 200
_REPEATS = 5


def allocate(
    model: nn.Module,
    mac_reduction: float,
    batches: Tensor,
    *,
    config: ProbePruningConfig | dict | None = None,
    kinds: tuple[str, ...] = ("mlp", "attention"),
    held_out: int = 4,
    strength: float = 0.5,
    cost: str = "macs",
    progress: bool = True,
) -> ProbePruningConfig:
    """Choose the ratio of every layer's MLP and attention from calibration text alone.

    Every group (the MLP or the query heads of one layer) is pruned alone, at four ratios, and the loss of the held-out
    calibration sequences is measured. The budget then goes, in small steps, where the interpolated loss grows least
    for each MAC saved. Losses of single groups do not add up exactly, so the result is drawn half way towards equal
    ratios of the groups that it uses.

    Args:
        model: an untransformed causal language model in eval mode. It is transformed while this runs and restored.
        mac_reduction: share of the decoder blocks' MACs to save, in (0, 1]; probe and compensation not counted.
        batches: int64 [N, T], calibration token ids; the last `held_out` sequences measure, the others calibrate.
        config: everything but the ratios, as in `pp_fx.transform`.
        kinds: which branches may be pruned, of "mlp" and "attention".
        held_out: sequences that measure the loss.
        strength: 1 takes the measured allocation as it is, 0 equal ratios; between them a mixture.
        cost: what the budget counts: "macs", or "time": seconds of a forward pass over the held-out sequences, measured
            here with each kind of branch whole and at half. Then `mac_reduction` is the share of that time to save.
        progress: show a progress bar on stderr.

    Returns:
        `config` with a tuple of ratios for `mlp_ratio` and `attention_ratio`. Kept counts are static, as always.

    Raises:
        InputError: an argument cannot be used, or the model has too little to prune for `mac_reduction`.
        StateError: the model is transformed already.
    """
    check_whole(model, "allocate")
    if is_transformed(model):
        raise StateError("model is already transformed; call pp_fx.restore(model) first")
    check_token_ids(model, batches, "batches")
    check_number("mac_reduction", mac_reduction, 0, 1, low_open=True)
    check_number("strength", strength, 0, 1)
    check_choice("cost", cost, ("macs", "time"))
    check_list("kinds", kinds, "('mlp', 'attention')")
    if set(kinds) - {"mlp", "attention"}:
        raise InputError(f"kinds={kinds!r} is not valid; choose of 'mlp' and 'attention'")
    if isinstance(held_out, bool) or not isinstance(held_out, int) or not 0 < held_out < len(batches):
        raise InputError(f"held_out={held_out!r} is not valid; give an integer from 1 to {len(batches) - 1}")
    config = as_config(config)
    probing = dataclasses.replace(  # unguarded: small batches, too, must be pruned here
        config,
        mlp_ratio=float("mlp" in kinds) * 0.5,
        attention_ratio=float("attention" in kinds) * 0.5,
        guard=False,
    )
    transform(model, probing)
    try:
        calibrate(model, batches[:-held_out], progress=progress)
        layers = layers_of(model)
        groups = [
            (i, kind, state, unit_macs(layer, layer.groups[kind]) * state.units)
            for i, layer in enumerate(layers)
            for kind, state in layer.states().items()
            if state.prunes
        ]
        losses = _losses(model, [state for _, _, state, _ in groups], batches[-held_out:], progress)
        dense, sizes = count_macs(model, *batches.shape).dense, [size for *_, size in groups]
        if cost == "time":
            dense, sizes = _seconds(model, [state for _, _, state, _ in groups], sizes, batches[-held_out:])
    finally:
        restore(model)
    budget = mac_reduction * dense
    if budget > LARGEST_RATIO * sum(sizes):
        most = LARGEST_RATIO * sum(sizes) / dense
        raise InputError(f"mac_reduction={mac_reduction} is more than the model's groups hold; give at most {most:.2f}")
    found = _spend(losses, sizes, budget)
    used = sum(s for s, r in zip(sizes, found, strict=True) if r > 0)
    equal = [budget / used if r > 0 else 0.0 for r in found]
    if max(equal, default=0.0) > LARGEST_RATIO:
        equal = found
    ratios = {"mlp": [0.0] * len(layers), "attention": [0.0] * len(layers)}
    for (i, kind, _, _), measured, even in zip(groups, found, equal, strict=True):
        ratios[kind][i] = strength * measured + (1 - strength) * even
    return dataclasses.replace(config, mlp_ratio=tuple(ratios["mlp"]), attention_ratio=tuple(ratios["attention"]))


def _seconds(model: Any, states: list[GroupState], sizes: list[float], ids: Tensor) -> tuple[float, list[float]]:
    """Time of the dense decoder, and what every group would save if it were dropped whole (shared out by its MACs).

    Time is taken with each kind at half, against dense, in turn; medians of `_REPEATS`.
    """
    kinds = sorted({s.kind for s in states})
    times: dict[str | None, list[float]] = {kind: [] for kind in (None, *kinds)}
    with put_back(states, "kept_units"), history_frozen(model), torch.no_grad():
        for _ in range(_REPEATS + 1):
            for kind in times:
                for state in states:
                    state.kept_units = state.units if state.kind != kind else (state.units + 1) // 2
                start = time.perf_counter()
                model.base_model(input_ids=ids.to(model.device), use_cache=False)
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                times[kind].append(time.perf_counter() - start)
    median = {kind: statistics.median(values[1:]) for kind, values in times.items()}  # the first warms up
    halves = {kind: sum(z for z, s in zip(sizes, states, strict=True) if s.kind == kind) / 2 for kind in kinds}
    per_mac = {kind: (median[None] - median[kind]) / halves[kind] for kind in kinds}
    for kind, saved in per_mac.items():
        if saved <= 0:
            raise InputError(
                f"cost='time': dropping half of every {kind} branch saves no time at {ids.shape[0]} x {ids.shape[1]} "
                "tokens; raise held_out, give longer sequences, or leave the kind out of kinds"
            )
    return median[None], [size * per_mac[s.kind] for size, s in zip(sizes, states, strict=True)]


def _losses(model: Any, states: list[GroupState], ids: Tensor, progress: bool) -> list[list[float]]:
    """For every group the growth of the loss at the ratios of the grid, the other groups dense; 0 at ratio 0."""
    losses: list[list[float]] = []
    with put_back(states, "kept_units"), history_frozen(model):
        for state in states:
            state.kept_units = state.units
        base = evaluate(model, ids, len(ids)).nll
        for state in track(states, "allocate", progress):
            row = [0.0]
            for ratio in _GRID:
                state.kept_units = max(1, state.units - round(ratio * state.units))
                row.append(evaluate(model, ids, len(ids)).nll - base)
            state.kept_units = state.units
            losses.append(row)
    return losses


def _spend(losses: list[list[float]], sizes: list[float], budget: float) -> list[float]:
    """Ratio of every group: steps of equal MACs, each to the group whose loss grows least by it."""
    grid = (0.0, *_GRID)
    # a convex, growing curve: what is cheap only after something dear is not cheap
    slopes = []
    for row in losses:
        steps = [(b - a) / (r - q) for a, b, q, r in zip(row, row[1:], grid, grid[1:], strict=False)]
        slopes.append(torch.tensor(steps).clamp(min=0).cummax(0).values.tolist())
    ratios, step = [0.0] * len(sizes), budget / _STEPS
    for _ in range(_STEPS):
        costs = []
        for ratio, size, slope in zip(ratios, sizes, slopes, strict=True):
            piece = min(int(ratio / _GRID[0] + 1e-9), len(slope) - 1)
            costs.append(slope[piece] / size if ratio + step / size <= LARGEST_RATIO else float("inf"))
        best = min(range(len(costs)), key=costs.__getitem__)
        if costs[best] == float("inf"):
            raise ConfigError("the budget cannot be spent in steps; lower mac_reduction")
        ratios[best] += step / sizes[best]
    return ratios
