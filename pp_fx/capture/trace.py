"""Capture: one decoder layer of a transformers model becomes one clean `torch.fx.Graph` with the layer's signature.

Steps: find the decoder layers (`layers`), record how the model really calls them (`calls`), `torch.export` one layer
per distinct structure on a fake bf16 copy (here), then clean the exported graph (`clean`: real parameter names,
run-time calls for the markers, no baked dtype, sizes read from `hidden_states`).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers.cache_utils import Cache, DynamicCache

from ..errors import CaptureError
from . import markers
from .calls import Call
from .clean import CAPTURE_DTYPE, TOKEN, TOKEN_NAME, Cleaner
from .layers import signature_of
from .reads import Reads, watch

_CACHED_LENGTH = 23


def _fake_copy(module: nn.Module, dtypes: dict[torch.dtype, torch.dtype]) -> nn.Module:
    """Deep copy whose tensors are fake (call under a FakeTensorMode), on their own device, with mapped dtypes."""
    memo: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        dtype = dtypes.get(tensor.dtype, tensor.dtype)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)

    for m in module.modules():
        for p in m._parameters.values():
            if p is not None:
                memo[id(p)] = nn.Parameter(fake(p), requires_grad=False)
        for b in m._buffers.values():
            if b is not None:
                memo[id(b)] = fake(b)
        if hasattr(m, "config"):
            memo[id(m.config)] = m.config
    return copy.deepcopy(module, memo)


class _Caller(nn.Module):
    """Calls the layer with recorded arguments whose tensors are the module's inputs (what torch.export wants)."""

    def __init__(self, layer, leaves, spec, slots, var_kwargs):
        super().__init__()
        self.layer = layer
        self._call = (leaves, spec, slots, var_kwargs)

    def forward(self, *tensors):
        leaves, spec, slots, var_kwargs = self._call
        flat = list(leaves)
        for slot, tensor in zip(slots, tensors, strict=False):
            flat[slot] = tensor
        for leaf in flat:
            if isinstance(leaf, markers.StubCache):
                leaf.cached = tensors[-1]
        arguments = pytree.tree_unflatten(flat, spec)
        kwargs = arguments.pop(var_kwargs) if var_kwargs else {}
        return self.layer(**arguments, **kwargs)


def capture_layer(model: nn.Module, layer: nn.Module, calls: tuple[Any, Any], reads: Reads | None = None) -> fx.Graph:
    """Capture one layer.

    Args:
        model: its config selects the attention implementation.
        layer: the decoder layer; not changed.
        calls: two recorded calls of different batch and length; dimensions that differ become dynamic.
        reads: gets the attributes whose values the graph holds.

    Returns:
        Graph with the layer's own signature (defaults and **kwargs included). Nodes carry fake tensors of the capture
        in `meta["val"]`.

    Routed experts, and a submodule that takes the KV cache and cannot be captured, stay whole: the graph calls them
    as the layer does, and their nodes' `meta["reason"]` says why.

    Raises:
        CaptureError: the layer does something that a graph cannot represent.
    """
    try:
        return _capture(model, layer, calls, {}, "", reads)
    except CaptureError as error:
        try:
            whole = _modules_with_cache(layer, calls[0])
        except CaptureError:
            raise
        except Exception:  # it does not run on fake tensors at all, for the same reason
            whole = {}
        if not whole:
            raise
        reason = f"runs as the module it is ({str(error).splitlines()[0]})"
        return _capture(model, layer, calls, whole, reason, reads)


def _only_writes(node: fx.Node) -> bool:
    """Whether a node changes a tensor (through a view of it) and nothing reads what it returns."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and not node.users


def _modules_with_cache(layer: nn.Module, call: Call) -> dict[str, Any]:
    """The innermost submodules that are given the KV cache: path -> a function from [B, T, H] to what they return."""
    found: dict[str, Any] = {}
    with FakeTensorMode():
        copied = _fake_copy(layer, {})
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), call)
        args, kwargs = pytree.tree_map_only(Cache, lambda _: DynamicCache(), (args, kwargs))
        inside: list[str] = []

        def enter(name: str, given: Any) -> None:
            if any(isinstance(leaf, Cache) for leaf in pytree.tree_leaves(given)):
                inside.append(name)

        def leave(name: str, given: Any, result: Any) -> None:
            if name in inside and not any(other.startswith(f"{name}.") for other in found):
                hidden = next(leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor))
                found[name] = _output_like(result, hidden.shape)

        for name, module in copied.named_modules():
            if name:
                module.register_forward_pre_hook(lambda m, a, k, name=name: enter(name, (a, k)), with_kwargs=True)
                module.register_forward_hook(
                    lambda m, a, k, result, name=name: leave(name, (a, k), result), with_kwargs=True
                )
        with torch.no_grad():
            copied(*args, **kwargs)
    return found


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
    """torch logs what it raises as well."""
    logger = logging.getLogger(name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _output_like(result: Any, shape: torch.Size) -> Any:
    """Function from a tensor of `shape` to a result of the same form; other tensors (attention weights) are None."""
    leaves, spec = pytree.tree_flatten(result)
    own = [isinstance(leaf, torch.Tensor) and leaf.shape == shape for leaf in leaves]
    if sum(own) != 1:
        raise CaptureError(f"a module that takes the KV cache returns {sum(own)} tensors [B, T, H]; it needs one")

    def output(tensor: torch.Tensor) -> Any:
        return pytree.tree_unflatten([tensor if mine else None for mine in own], spec)

    return output


def _capture(
    model: nn.Module,
    layer: nn.Module,
    calls: tuple[Any, Any],
    whole: dict[str, Any],
    reason: str,
    reads: Reads | None,
) -> fx.Graph:
    """`capture_layer`; the submodules in `whole` stay calls, for `reason`."""
    signature = signature_of(layer)
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        raise CaptureError(f"{type(layer).__name__}.forward takes *args; a graph needs named arguments")
    var_kwargs = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    def bind(call):
        bound = signature.bind(*call[0], **call[1])
        bound.apply_defaults()
        caches = [k for k, v in bound.arguments.items() if isinstance(v, Cache)]
        if len(caches) != 1:
            raise CaptureError(f"{type(layer).__name__} takes {len(caches)} KV caches as arguments; it needs one")
        arguments = {k: markers.StubCache() if isinstance(v, Cache) else v for k, v in bound.arguments.items()}
        if var_kwargs:
            arguments[var_kwargs] = {**arguments[var_kwargs], TOKEN_NAME: TOKEN}
        return arguments

    pathed, spec = pytree.tree_flatten_with_path(bind(calls[0]))
    leaves, others = [leaf for _, leaf in pathed], pytree.tree_leaves(bind(calls[1]))
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    float_dtype = next(p.dtype for p in layer.parameters() if p.is_floating_point())
    dtypes = {float_dtype: CAPTURE_DTYPE}

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs, dynamic = [], []
    with mode:
        for i in slots:
            tensor, other = leaves[i], others[i].shape
            varies = [d for d in range(tensor.ndim) if tensor.shape[d] != other[d]]
            dynamic.append(dict.fromkeys(varies, torch.export.Dim.AUTO))
            shape = list(tensor.shape)
            if tensor.ndim == 4 and {2, 3} <= set(varies):
                shape[3] = _CACHED_LENGTH  # a [.., T, S] mask: S is the cached length
            dtype = dtypes.get(tensor.dtype, tensor.dtype)
            inputs.append(torch.empty(shape, dtype=dtype, device=tensor.device))
        inputs.append(torch.empty(_CACHED_LENGTH, device=inputs[0].device))
        dynamic.append({0: torch.export.Dim.AUTO})
        caller = _Caller(_fake_copy(layer, dtypes), leaves, spec, slots, var_kwargs).eval()
    if reads is not None:
        watch(caller.layer, reads)
    for path, output in whole.items():
        markers.stay_whole(caller.layer.get_submodule(path), output, reason)

    names = {id(m): n for n, m in caller.layer.named_modules()}
    configs = {id(m.config): m.config for m in (model, *caller.layer.modules()) if hasattr(m, "config")}
    try:
        with (
            markers.recording(list(configs.values())) as sites,
            torch.no_grad(),
            _silenced("torch._subclasses.fake_tensor"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            program = torch.export.export(caller, tuple(inputs), dynamic_shapes=(tuple(dynamic),), strict=False)
            if any(_only_writes(node) for node in program.graph.nodes):
                program = program.run_decompositions({})  # writes as functions of what they change
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises many types; ours says which layer and keeps the cause
        raise CaptureError(f"torch.export cannot capture {type(layer).__name__}: {error}") from error
    cache: Any = next(path[0] for path, leaf in pathed if isinstance(leaf, markers.StubCache))
    return Cleaner(program, signature, var_kwargs, cache.key, [pathed[i][0] for i in slots], sites, names).clean()
