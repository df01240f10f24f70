"""What torch.export returns becomes a graph with the layer's own signature and no trace of the capture."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from ..errors import CaptureError
from ..runtime import model_calls
from ..runtime.names import LAYER
from . import markers

aten = torch.ops.aten
# In fp32 `x.to(float32)` would vanish from the trace; in bf16 nothing is upcast silently.
CAPTURE_DTYPE = torch.bfloat16


class KwargsToken:
    """Travels in the layer's **kwargs; where it arrives, **kwargs were forwarded."""


TOKEN = KwargsToken()
TOKEN_NAME = "pp_fx_kwargs_token"


class Cleaner:
    """Exported program -> Graph with the layer's own signature.

    Args:
        program: torch.export's result for a call of the layer.
        signature: of the layer's forward; var_kwargs: the name of its **kwargs, or None.
        cache: name of the argument that is the KV cache.
        paths: where in the arguments each tensor input sits.
        sites: of the markers. module_names: id of a captured module -> its path in the layer.
    """

    def __init__(self, program, signature, var_kwargs, cache, paths, sites, module_names):
        self.program = program
        self.paths = paths
        self.sites = sites
        self.module_names = module_names
        self.graph = fx.Graph()
        self.env: dict[Any, Any] = {}
        self.arguments: dict[str, fx.Node] = {}
        for p in signature.parameters.values():
            name = f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name
            default = () if p.default is p.empty else (p.default,)
            self.arguments[p.name] = self.graph.create_node("placeholder", name, default, {}, name=p.name)
        self.var_kwargs = var_kwargs
        self.hidden = next(iter(self.arguments.values()))
        self.cache = self.arguments[cache]
        self.cache.meta["kv_cache"] = True
        self.keys: fx.Node | None = None
        self._shared: dict[Any, fx.Node] = {}

    def clean(self) -> fx.Graph:
        names = list(self.program.graph_signature.user_inputs)
        cached_name = names.pop()
        inputs = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        by_name = {n.name: n for n in inputs}
        self.symbols = [str(s) for s in by_name[names[0]].meta["val"].shape[:2]]
        self.cached_symbol = str(by_name[cached_name].meta["val"].shape[0])
        for name, path in zip(names, self.paths, strict=True):
            node = self.arguments[path[0].key]
            for key in path[1:]:
                step = key.key if hasattr(key, "key") else key.idx
                node = self.graph.call_function(operator.getitem, (node, step))
            node.meta["val"] = by_name[name].meta["val"]
            self.env[by_name[name]] = node
        # sizes and the dtype are read from hidden_states, once, at the top
        for dim in (0, 1):
            node = self.graph.call_function(aten.sym_size.int, (self.hidden, dim))
            node.meta["val"] = by_name[names[0]].meta["val"].shape[dim]
            self._shared[self.symbols[dim]] = node
        self._shared["dtype"] = self.graph.call_function(getattr, (self.hidden, "dtype"))
        lifted = {**self.program.graph_signature.inputs_to_parameters, **self.program.graph_signature.inputs_to_buffers}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in lifted:
                    self._put(node, self.graph.get_attr(lifted[node.name].removeprefix("layer.")))
                elif node not in self.env and node.name != cached_name:
                    raise CaptureError(f"the layer makes the constant {node.name}, which cannot be captured yet")
            elif node.op == "output":
                results = [self.env[a] if isinstance(a, fx.Node) else a for a in node.args[0]]
                self.graph.output(pytree.tree_unflatten(results, self.program.call_spec.out_spec))
            else:
                self._call(node)
        keep = {model_calls.kv_update, model_calls.call_module}
        self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or n.target in keep)
        self.graph.lint()
        return self.graph

    def _put(self, node: fx.Node, new: fx.Node) -> None:
        new.meta.update({k: v for k, v in node.meta.items() if k == "val"})
        self.env[node] = new

    def _call(self, node: Any) -> None:
        if node.target is aten._assert_tensor_metadata.default:
            return
        if node.target is aten.sym_size.int and str(node.meta["val"]) in self.symbols:
            self.env[node] = self._shared[str(node.meta["val"])]
        elif node.target is aten.sym_size.int and str(node.meta["val"]) == self.cached_symbol:
            return  # `_value` reads it of the keys, which the graph has only later
        elif node.target is markers.KV_UPDATE:
            k, v = (self.env[a] for a in node.args[:2])
            layer = self.graph.get_attr(LAYER)
            self._put(node, self.graph.call_function(model_calls.kv_update, (self.cache, k, v, layer)))
        elif node.target is markers.ATTENTION:
            self._attention(node)
        elif node.target is markers.MODULE:
            self._module(node)
        else:
            new = self.graph.node_copy(node, self._value)
            if node.target is operator.getitem and node.args[0].target is markers.KV_UPDATE and node.args[1] == 0:
                self.keys = new
            bake = self._shared["dtype"]
            new.args = tuple(bake if a is CAPTURE_DTYPE else a for a in new.args)
            new.kwargs = {k: bake if a is CAPTURE_DTYPE else a for k, a in new.kwargs.items()}
            self._put(node, new)

    def _value(self, node: fx.Node) -> fx.Node:
        """What stands for a node of the program; for the number of keys, their size where it is needed first."""
        if node not in self.env and str(node.meta.get("val")) == self.cached_symbol and self.keys is not None:
            self.env[node] = self.graph.call_function(aten.sym_size.int, (self.keys, 2))
            self.env[node].meta["val"] = node.meta["val"]
        return self.env[node]

    def _attention(self, node: Any) -> None:
        q, k, v, mask, extra, number = node.args
        site = self.sites[number]
        plain = dict(site.plain)
        tensors = dict(zip(site.tensor_names, (self.env[e] for e in extra), strict=True))
        forwarded = None
        if plain.pop(TOKEN_NAME, None) is TOKEN and self.var_kwargs is not None:
            forwarded = self.arguments[self.var_kwargs]
        for name in [*plain, *tensors]:
            if name in self.arguments:  # the caller's value at run time, not the one seen at capture
                plain.pop(name, None)
                tensors[name] = self.arguments[name]
            elif forwarded is not None and name in tensors and tensors[name].args[:1] == (forwarded,):
                del tensors[name]  # arrives with **kwargs
        module = self.graph.get_attr(self.module_names[id(site.module)])
        args = (module, self.env[q], self.env[k], self.env[v], None if mask is None else self.env[mask], forwarded)
        new = self.graph.create_node(
            "call_function", model_calls.attention, args, {**plain, **tensors}, name="attention"
        )
        self._put(node, new)

    def _module(self, node: Any) -> None:
        site: markers.ModuleSite = self.sites[node.args[1]]

        def value(leaf: Any) -> Any:
            if isinstance(leaf, markers.TensorNumber):
                return self.env[node.args[0][leaf]]
            return self.cache if isinstance(leaf, markers.StubCache) else leaf

        args, kwargs = pytree.tree_unflatten([value(leaf) for leaf in site.leaves], site.spec)
        forwarded = None
        if kwargs.pop(TOKEN_NAME, None) is TOKEN and self.var_kwargs is not None:
            forwarded = self.arguments[self.var_kwargs]
        for name, value in kwargs.items():
            if name in self.arguments and not isinstance(value, fx.Node):
                kwargs[name] = self.arguments[name]  # the caller's value at run time, not the one seen at capture
        module = self.graph.get_attr(self.module_names[id(site.module)])
        new = self.graph.call_function(model_calls.call_module, (module, args, kwargs, forwarded))
        new.meta["reason"] = site.reason
        self._put(node, new)
