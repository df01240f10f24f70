"""The dense model with one selection cut out of its weights for good: what pruning while it runs is compared with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .cache import selections_on
from .transform import layers_of


def static_copy(model: nn.Module, pruned: nn.Module, ids: Tensor) -> nn.Module | None:
    """A copy of a dense model whose MLP layers hold the channels alone that a prompt selects, without compensation.

    It is wrong for other prompts: it tells how fast a pruned model could be that decides nothing while it runs.

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
    with torch.no_grad():
        pruned.base_model(input_ids=ids, past_key_values=cache)  # type: ignore[operator]
    selections: Any = selections_on(cache)
    if selections is None:  # the guard found the prompt too small
        return None
    cut = copy.deepcopy(model)
    names = {id(module): name for name, module in pruned.named_modules()}
    for index, chosen in selections.layers.items():
        layer: Any = cut.get_submodule(names[id(layers[index])])
        kept, group = chosen["mlp"].kept, layers[index].groups["mlp"]
        for part in (*group.inputs, group.output):
            axis = 1 if part is group.output else 0
            linear = layer.get_submodule(part.path.rpartition(".")[0])
            linear.weight = nn.Parameter(linear.weight.detach().index_select(axis, kept), requires_grad=False)
            setattr(linear, "in_features" if axis else "out_features", len(kept))
    return cut
