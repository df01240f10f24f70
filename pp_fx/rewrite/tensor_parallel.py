"""Tensor parallel models of transformers (`DistributedConfig(tp_plan="auto")`): what is served, and a shard on its own.

transformers keeps the parameters as DTensors and gives the modules of its plan another `forward`, which communicates.
A shard of a decoder layer without these is an ordinary, narrower layer: that one is captured, rewritten and compared.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..errors import ConfigError, UnsupportedModelError
from ..layouts import is_plain
from ..passes import Cut
from ..ranks import of_all, world
from ..shards import Shards, is_distributed, local

_SOURCE = "transformers.distributed.tensor_parallel"
"""Where the `forward` comes from that transformers gives a module."""
_CUT = {"colwise": 0, "rowwise": -1}
"""Style of a module in the plan -> the dimension of its weight that is cut."""
_WHOLE = ("replicated_with_grad_allreduce", "replicate")
"""Styles that change nothing without gradients."""


def replaces_forward(module: nn.Module) -> bool:
    """Whether transformers' tensor parallelism has given the module another `forward`."""
    return getattr(module.__dict__.get("forward"), "__module__", "") == _SOURCE


def find_shards(model: nn.Module) -> Shards | None:
    """Which shard of a tensor parallel model this process holds; None of a model that is whole.

    Raises:
        UnsupportedModelError: the parameters are distributed in another way.
    """
    named: list[tuple[str, Any]] = [(name, p) for name, p in model.named_parameters() if is_distributed(p)]
    if not named:
        return None
    if any(c.__name__ == "FSDPModule" for m in model.modules() for c in type(m).__mro__):
        raise UnsupportedModelError(
            f"parameter {named[0][0]} is sharded by FSDP2 (fully_shard), which puts a layer together only while it "
            "runs; load the whole model on every rank (pp_fx.calibrate and evaluate share batches between ranks), or "
            "use tensor parallelism"
        )
    name, first = named[0]
    mesh = first.device_mesh
    other = next((n for n, p in named if p.device_mesh != mesh), None)
    if other is not None or mesh.ndim != 1 or not hasattr(model, "tp_plan"):
        raise UnsupportedModelError(
            f"parameter {other or name} is distributed over {mesh if other is None else 'another mesh'}; only "
            "transformers' tensor parallelism alone is served: DistributedConfig(tp_plan='auto')"
        )
    if mesh.size() != world()[1]:
        raise UnsupportedModelError(
            f"tp_size={mesh.size()} of {world()[1]} processes: tensor parallelism beside another parallelism is not "
            "served; start as many processes as tp_size"
        )
    return Shards(mesh.get_local_rank(), mesh.size(), mesh.get_group())


def check_same(config: Any, shards: Shards) -> None:
    """All ranks must prune alike: shapes and decisions would differ.

    Raises:
        ConfigError: on all ranks, where the configurations differ.
    """
    found = of_all(repr(config), shards.group)
    odd = next((rank for rank, other in enumerate(found) if other != found[0]), None)
    if odd is not None:
        raise ConfigError(f"config of rank {odd} is not that of rank 0; give all ranks of the model the same one")


def check_shards(model: Any, layers: nn.ModuleList, config: Any, shards: Shards) -> None:
    """What of a tensor parallel model's layers can be pruned shard by shard.

    Raises:
        ConfigError: `config` asks for what ranks would decide differently.
        UnsupportedModelError: a style of the plan, quantized shards, or shards that are not equal, or no whole heads.
    """
    if config.guard:
        raise ConfigError("guard=True measures every rank by itself, and they must decide alike; set guard=False")
    path = next(name for name, module in model.named_modules() if module is layers)
    for name, module in layers.named_modules():
        style = model.tp_plan.get(_generic(f"{path}.{name}"))
        own = {n: p for n, p in module.named_parameters(recurse=False) if is_distributed(p)}
        if not own and not replaces_forward(module):
            continue
        where = f"{path}.{name} ({type(module).__name__})"
        if style not in (*_CUT, *_WHOLE):
            raise UnsupportedModelError(
                f"{where} has the style {style!r} in tp_plan, whose communication a rewritten layer would not make; "
                f"only {', '.join(map(repr, (*_CUT, *_WHOLE)))} can be pruned: give such a plan in "
                "DistributedConfig(tp_plan=..), or load the whole model"
            )
        if getattr(module, "_hf_quantized_needs_local_tp", False) or not all(is_plain(local(p)) for p in own.values()):
            raise UnsupportedModelError(
                f"{where} is quantized and cut into shards, of which no rows can be taken; load the model unquantized, "
                "or on one device"
            )
        weight = own.get("weight")
        if style in _CUT and weight is not None and weight.shape[_CUT[style]] % shards.size:
            raise UnsupportedModelError(
                f"tp_size={shards.size} does not divide the {weight.shape[_CUT[style]]} channels of {where}; choose a "
                "tp_size that does"
            )
    _check_heads(model, layers, shards.size)


def _check_heads(model: Any, layers: nn.ModuleList, count: int) -> None:
    """Raises:

    UnsupportedModelError: a shard of an attention would not hold whole groups of heads.
    """
    attentions = [m for layer in layers for m in layer.modules() if hasattr(m, "is_causal")]
    if not any(is_distributed(p) for attention in attentions for p in attention.parameters()):
        return
    config = model.config.get_text_config(decoder=True)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % count:
            raise UnsupportedModelError(
                f"tp_size={count} does not divide {name}={heads}: no shard would hold whole heads; choose a tp_size "
                "that does"
            )


def _generic(name: str) -> str:
    """As a plan names modules: numbers of layers are wildcards."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def cut_of(layer: nn.Module) -> Cut | None:
    """What of a layer is cut into shards; None of one that is whole."""
    found: dict[str, Any] = {name: p for name, p in layer.named_parameters() if is_distributed(p)}
    if not found:
        return None
    summed = {name for name, p in found.items() if p.ndim == 2 and p.placements[0].is_shard(1)}
    mesh = next(iter(found.values())).device_mesh
    return Cut(frozenset(found), frozenset(summed), mesh.size())


@contextlib.contextmanager
def as_local(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, layers are those of this process's shard alone: ordinary parameters, no communication."""
    modules = [m for layer in layers for m in layer.modules()]
    cut: list[Any] = [(m, name, p) for m in modules for name, p in m._parameters.items() if is_distributed(p)]
    replaced = [(m, m.__dict__["forward"]) for m in modules if replaces_forward(m)]
    try:
        for module, name, parameter in cut:
            module._parameters[name] = nn.Parameter(local(parameter.detach()), requires_grad=False)
        for module, _ in replaced:
            del module.__dict__["forward"]
        yield
    finally:
        for module, name, parameter in cut:
            module._parameters[name] = parameter
        for module, forward in replaced:
            module.__dict__["forward"] = forward
