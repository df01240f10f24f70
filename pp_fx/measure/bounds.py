"""What pruning while it runs is compared with: one prompt's selection, cut out of the weights or as a mask."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..layouts import is_plain, take_columns, take_rows
from ..rewrite.layer import layers_of
from ..runtime.modes import selections_kept
from ..runtime.selections import selections_on


class StaticCopies(NamedTuple):
    """Copies of a dense model for the MLP channels that one prompt selects, without compensation; for others wrong.

    Attributes:
        cut: its weights hold the kept channels alone: as fast as a model could be that decides nothing while it runs.
        masked: whole weights, the dropped channels set to zero: what pruning without smaller products costs.
    """

    cut: nn.Module
    masked: nn.Module


def static_copies(model: nn.Module, pruned: nn.Module, ids: Tensor) -> StaticCopies | None:
    """The copies for what a prompt selects; they share with the model the weights that they do not cut.

    Args:
        model: the dense model.
        pruned: a transformed copy of it.
        ids: int64 [B, T], the prompt.

    Returns:
        None where nothing or attention heads are pruned, the guard leaves the prompt dense, or a projection is fused,
        transposed or has a bias.
    """
    layers = layers_of(pruned)
    groups = [(kind, layer.groups[kind]) for layer in layers for kind, s in layer.states().items() if s.prunes]
    parts = [part for _, group in groups for part in (*group.inputs, group.output)]
    if not groups or any(kind != "mlp" or group.vectors for kind, group in groups):
        return None
    if any(part.rows is not None or part.transposed or part.bias is not None for part in parts):
        return None
    cache = DynamicCache(config=pruned.config)  # type: ignore[arg-type]
    with torch.no_grad(), selections_kept(layers):
        pruned.base_model(input_ids=ids, past_key_values=cache)  # type: ignore[operator]
    selections: Any = selections_on(cache)
    if not selections.layers:  # the guard found the prompt too small
        return None
    copies = StaticCopies(_copy(model), _copy(model))
    names = {id(module): name for name, module in pruned.named_modules()}
    for index, chosen in selections.layers.items():
        kept, group, name = chosen["mlp"].kept, layers[index].groups["mlp"], names[id(layers[index])]
        for part in (*group.inputs, group.output):
            linear: Any = copies.cut.get_submodule(name).get_submodule(part.path.rpartition(".")[0])
            axis = 1 if part is group.output else 0
            linear.weight = nn.Parameter(_taken(linear.weight.detach(), axis, kept), requires_grad=False)
            setattr(linear, "in_features" if axis else "out_features", len(kept))
        output = copies.masked.get_submodule(name).get_submodule(group.output.path.rpartition(".")[0])
        _mask(output, kept)
    return copies


def _copy(model: nn.Module) -> nn.Module:
    """A copy that shares the weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _taken(weight: Tensor, axis: int, kept: Tensor) -> Tensor:
    if is_plain(weight):
        return weight.index_select(axis, kept)
    return take_columns(weight, kept) if axis else take_rows(weight, kept)


def _mask(output: Any, kept: Tensor) -> None:
    mask = torch.zeros(output.weight.shape[1], dtype=output.weight.dtype, device=kept.device).index_fill(0, kept, 1)
    output.register_forward_pre_hook(lambda _, inputs: (inputs[0] * mask,))
