"""A rewritten decoder layer: the same object and the same class, with a generated `forward`.

A layer is rewritten by giving it a subclass of its own class (as torch.nn.utils.parametrize does), one per distinct
structure. So hooks, references, `isinstance`, parameter names and deepcopy keep working, and regional compilation
sees one code object for all layers.
"""

from __future__ import annotations

import copy
import linecache
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..config import Kind, ProbePruningConfig
from ..errors import StateError
from ..groups.group import Group
from ..groups.projections import Projection
from ..kernels.coded import Coded, encode
from ..layouts import is_plain, widened
from ..methods.score import column_sum
from ..runtime.modes import put_back
from ..runtime.names import LAYER, state_name
from ..runtime.plan import LayerInfo
from ..runtime.state import GroupState
from ..shards import held, local

_numbers = count()
_versions = count(1)
"""Of all layers of the process: copies of a model that load other weights must not meet again."""


def compile_graph(graph: fx.Graph, name: str, linear: Callable[..., Any] = F.linear) -> Callable[..., Any]:
    """The Python function of a graph, `forward(self, *inputs)`; its source shows up in tracebacks.

    Linear layers are called as torch's function, which quantized weights define and `aten.linear` is taken apart for,
    or as another `linear` like it.
    """
    linears = [node for node in graph.nodes if node.target is torch.ops.aten.linear.default]
    with put_back(linears, target=linear):
        code = graph.python_code("self")
    filename = f"<pp_fx {name} {next(_numbers)}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    return namespace["forward"]


class ProbePrunedLayer:
    """Mixin of every rewritten layer. `graph` is the torch.fx graph that its `forward` was generated from."""

    graph: fx.Graph
    original_class: type[nn.Module]
    groups: dict[Kind, Group]
    gates: dict[Kind, Projection]
    """Of gated MLPs that decode by step."""
    reasons: list[str]
    """Why a branch of the layer is left dense."""

    def states(self) -> dict[Kind, GroupState]:
        """Group kind -> state."""
        return {kind: getattr(self, state_name(kind)) for kind in self.groups}

    def refresh(self) -> None:
        """Bring memory layout and column norms in line with the present weights; selections made before are void."""
        self.__dict__[LAYER].version = next(_versions)
        for kind, state in self.states().items():
            if state.prunes or state.steps:
                group, settings = self.groups[kind], self.__dict__[LAYER].settings
                for path in group.gathered_by_column:
                    parameter = held(self.get_parameter(path))  # type: ignore[attr-defined]
                    _lay_out(parameter, state.steps and path == group.output.path)
                coded = coded_gate(self, kind, settings) if state.steps else None  # type: ignore[arg-type]
                reach = input_reach(self, group, settings)  # type: ignore[arg-type]
                if reach is not None and state.shards is not None:  # all ranks take the same rows
                    dist.all_reduce(reach, group=state.shards.group)
                state.refresh(output_weight(self, group), reach, coded)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError(
            "a transformed model cannot be pickled (torch.save of the whole model, multiprocessing): its layers have "
            "classes made at run time; use model.save_pretrained or torch.save(model.state_dict()), or transform it in "
            "the worker process"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.refresh()
        return self


def block_class(
    layer_class: type[nn.Module],
    graph: fx.Graph,
    groups: dict[Kind, Group],
    reasons: list[str],
    gates: dict[Kind, Projection],
) -> type:
    """The class for the layers of one structure."""
    body = {
        "graph": graph,
        "original_class": layer_class,
        "groups": groups,
        "gates": gates,
        "reasons": reasons,
        "forward": compile_graph(graph, layer_class.__name__),
        "__doc__": f"{layer_class.__name__} rewritten by pp_fx.",
    }
    return type(f"ProbePruned{layer_class.__name__}", (ProbePrunedLayer, layer_class), body)


def install(layer: nn.Module, cls: type, info: LayerInfo, states: dict[Kind, GroupState]) -> None:
    """Turn `layer` into a block of class `cls`, in place."""
    layer.__class__ = cls  # type: ignore[assignment]  # first, so that `uninstall` undoes whatever has been done
    layer.__dict__[LAYER] = info
    for kind, state in states.items():
        layer.add_module(state_name(kind), state)
    layer.register_load_state_dict_post_hook(_refresh_after_load)
    layer.refresh()  # type: ignore[operator]


def uninstall(layer: nn.Module) -> None:
    """Undo `install`: class, attributes and memory layout as before."""
    assert isinstance(layer, ProbePrunedLayer)
    for kind in layer.groups:
        state = layer._modules.get(state_name(kind))
        if state is None:
            continue  # interrupted while it was installed
        if state.prunes or state.steps:
            with torch.inference_mode(False), torch.no_grad():
                for path in layer.groups[kind].gathered_by_column:
                    weight = held(layer.get_parameter(path))
                    if is_plain(weight):
                        weight.data = weight.data.contiguous()
        delattr(layer, state_name(kind))
    hooks = layer._load_state_dict_post_hooks
    for key in [k for k, hook in hooks.items() if hook is _refresh_after_load]:
        del hooks[key]
    layer.__dict__.pop(LAYER, None)
    layer.__class__ = layer.original_class  # type: ignore[assignment]


def is_transformed(model: nn.Module) -> bool:
    """Whether `transform` has rewritten this model.

    Args:
        model: any module; of a wrapper (torch.compile, PEFT) the model inside counts.
    """
    return any(isinstance(m, ProbePrunedLayer) for m in model.modules())


def layers_of(model: nn.Module) -> list[Any]:
    """The rewritten decoder layers of a transformed model, in order.

    Raises:
        StateError: the model is not transformed.
    """
    layers = [m for m in model.modules() if isinstance(m, ProbePrunedLayer)]
    if not layers:
        raise StateError(f"model={type(model).__name__} is not transformed; call pp_fx.transform(model) first")
    return layers


def config_of(model: nn.Module) -> ProbePruningConfig:
    """What a transformed model (or the one inside a wrapper) prunes, as it was given to `transform`.

    Raises:
        StateError: the model is not transformed.
    """
    return layers_of(model)[0].__dict__[LAYER].config


def settings_of(model: nn.Module) -> ProbePruningConfig:
    """`config_of` with a value for everything that it leaves to the device.

    Raises:
        StateError: the model is not transformed.
    """
    return layers_of(model)[0].__dict__[LAYER].settings


def output_weight(layer: nn.Module, group: Group) -> Tensor:
    """Weight [H, C] of a group's output projection."""
    weight = local(layer.get_parameter(group.output.path))
    return weight.t() if group.output.transposed else weight


@torch.no_grad()
def input_reach(layer: nn.Module, group: Group, settings: ProbePruningConfig) -> Tensor | None:
    """How strongly a branch's input projections read each feature, fp32 [H]; None where no probe ranks by it.

    The squared column norms of their weights; ones where the branch reads the residual through no projection.
    """
    if settings.probe is None or settings.probe.ranking != "outlier":
        return None
    width = output_weight(layer, group).shape[0]
    with torch.inference_mode(False):
        total = torch.zeros(width, dtype=torch.float32, device=output_weight(layer, group).device)
        for part in group.inputs or group.read:
            stored = local(layer.get_parameter(part.path))
            weight = stored.t() if part.transposed else widened(stored)
            if weight.shape[1] == width:
                total += column_sum(weight if part.rows is None else weight[list(part.rows)], 2)
        return total if total.is_meta or bool(total.any()) else torch.ones_like(total)


def coded_gate(layer: Any, kind: Kind, settings: ProbePruningConfig) -> Coded | None:
    """The copy of a gate projection that ranks in its place, where the configuration asks for one."""
    gate = layer.gates.get(kind)
    if settings.step_probe is None or gate is None:
        return None
    weight = local(layer.get_parameter(gate.path))
    weight = weight.t() if gate.transposed else weight
    weight = widened(weight)
    return encode(weight if gate.range is None else weight[slice(*gate.range)], int(settings.step_probe[3:]))


def _refresh_after_load(layer: Any, _incompatible: Any) -> None:
    layer.refresh()


def _lay_out(weight: Tensor, steps: bool) -> None:
    """Keep the shape, but let the memory hold the transpose where columns are read as contiguous rows.

    An accelerator gathers them so, and a decode step by token reads them so everywhere. Else a CPU multiplies more
    slowly with transposed weights than it gathers columns (docs/research/speed.md, section 3). Quantized weights lie as
    the library that multiplies with them wants it.
    """
    if not is_plain(weight):
        return
    turned = steps or weight.device.type != "cpu"
    if (weight.t() if turned else weight).is_contiguous():
        return
    with torch.inference_mode(False), torch.no_grad():
        weight.data = weight.data.t().contiguous().t() if turned else weight.data.contiguous()
