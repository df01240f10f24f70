"""Finding the channel groups of a captured layer; heads by proof (`prove`)."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from ..errors import CaptureError
from ..runtime import model_calls
from .dataflow import carries_no_data, cone, is_input, is_mask, is_parameter, residual_stream, shape
from .group import AttentionGroup, Group, Groups, MlpGroup
from .projections import Projection, escapes, find_part, find_projections, head_axis
from .prove import NoProof, prove_output, prove_query, prove_written_out

aten = torch.ops.aten


def find_groups(graph: fx.Graph, shards: dict[str, int] | None = None) -> Groups:
    """The channel groups of a captured layer.

    Args:
        graph: of the layer, or of one shard of it.
        shards: path of a weight that is cut by column -> into how many parts.
    """
    result, finder = Groups(), _Finder(graph, shards or {})
    result.reasons = [f"{n.args[0].target}: {n.meta['reason']}" for n in graph.nodes if n in finder.modules]
    for projection in finder.by_node.values():
        try:
            group = finder.group_of(projection)
        except (NoProof, CaptureError) as reason:
            result.reasons.append(f"{projection.module}: {reason}")
            continue
        if isinstance(group, MlpGroup):
            narrow, wide = sorted((group, result.mlp or group), key=lambda g: g.units)
            if narrow is not wide:
                result.reasons.append(f"{narrow.output.module}: the layer has another MLP, at least as wide")
            result.mlp = wide
        elif isinstance(group, AttentionGroup):
            result.attention = group
            if not group.inputs:
                result.reasons.append(f"{projection.module}: the query projection runs whole ({finder.whole_query})")
    for kind, found in (("MLP", result.mlp), ("attention", result.attention)):
        if found is None and not result.reasons:
            result.reasons.append(f"no {kind} group: its projections are no plain linear layers")
    return result


class _Finder:
    def __init__(self, graph: fx.Graph, shards: dict[str, int]) -> None:
        self.graph, self.shards = graph, shards
        self.by_node = {p.node: p for p in find_projections(graph)}
        self.cores = {n for n in graph.nodes if n.target is model_calls.attention}
        self.caches = {n for n in graph.nodes if n.target is model_calls.kv_update}
        self.modules = {n for n in graph.nodes if n.target is model_calls.call_module}
        self.walls = {*self.by_node, *self.cores, *self.caches, *self.modules}
        self.stream = residual_stream(graph, self.walls)
        self.width = shape(next(iter(graph.nodes)))[-1]
        self.whole_query = ""

    def group_of(self, output: Projection) -> Group | None:
        """The group whose output projection this is, or None if it reads the residual stream."""
        _, met = cone([output.x], self.walls | set(self.stream))
        if any(m in self.stream or m in self.modules for m in met):
            return None
        if met & (self.cores | self.caches):
            return self._attention(output, met)
        return self._mlp(output, [self.by_node[n] for n in self.graph.nodes if n in met])

    def _residual_before(self, nodes: list[fx.Node]) -> fx.Node:
        _, met = cone(nodes, set(self.stream) | self.modules)
        if len(met) != 1:
            raise NoProof(f"{nodes[0].name} does not come from one point of the residual stream")
        return met.pop()

    def _refuse_other_inputs(self, state: list[fx.Node]) -> None:
        """Every argument of the layer that the branch reads must have rows that the probe can take."""
        inside, _ = cone(state, set(self.stream) | self.modules | self.caches)
        batch, length = shape(next(iter(self.graph.nodes)))[:2]
        for node in [n for n in self.graph.nodes if n in inside and is_input(n) and shape(n) and not is_mask(n)]:
            if str(shape(node)[:2][-1]) != str(length) or str(shape(node)[0]) not in ("1", str(batch)):
                raise NoProof(f"{node.name} is no argument [B, T, ..], whose rows the probe could take")

    # ------------------------------------------------------------------ MLP
    def _mlp(self, output: Projection, linears: list[Projection]) -> MlpGroup:
        channels = output.in_features
        if 2 * channels * self.shards.get(output.path, 1) < self.width:
            raise NoProof("it is narrower than half the residual stream (a low-rank adapter)")
        if any(len(shape(n)) > 3 for n in (output.x, *(p.node for p in linears))):
            raise NoProof("its linear layers work on more than three axes")
        if len({p.x for p in linears}) != 1:
            raise NoProof("its input projections read different inputs")
        inside, _ = cone([output.x], set(self.by_node))
        inputs = [part for p in linears for part in self._mlp_parts(p, output, inside, channels)]
        fused = [p for p in inputs if p.rows is not None]
        escaping = escapes(self.graph, fused)
        if escaping:
            raise NoProof(f"{fused[0].linear.name} is also used by {escaping}")
        inside, _ = cone([output.x], {p.node for p in inputs})
        between = [n for n in self.graph.nodes if n in inside]  # graph order: the same reason at every run
        vectors = []
        for node in between:
            if is_parameter(node):
                if shape(node) != (channels,):
                    raise NoProof(f"{node.name} is a parameter between the projections")
                vectors.append(node)
            elif torch.Tag.pointwise not in getattr(node.target, "tags", ()):
                raise NoProof(f"{node.name} between the projections is not pointwise")
            elif (shape(node) or (channels,))[-1] not in (channels, 1):
                raise NoProof(f"{node.name} between the projections changes the channel axis")
        inside.add(output.node)
        for node in (*between, *(p.node for p in inputs)):
            outside = [u.name for u in node.users if u not in inside]
            if outside:
                raise NoProof(f"{node.name} is also used by {outside[0]}")
        self._refuse_other_inputs([output.x])
        residual = self._residual_before([inputs[0].x])
        return MlpGroup(residual, tuple(inputs), output, channels, 1, tuple(vectors))

    def _mlp_parts(
        self, linear: Projection, output: Projection, inside: set[fx.Node], channels: int
    ) -> list[Projection]:
        """The input projection itself, or the parts of a fused one that are [B, T, channels]."""
        if linear.out_features == channels:
            return [linear]
        parts: dict[fx.Node, Projection] = {}
        for node in [n for n in self.graph.nodes if n in inside]:
            if (shape(node) or ())[2:] != (channels,) or cone([node], set(parts))[1]:
                continue
            part = find_part(self.graph, linear, node, functools.partial(operator.is_, node))
            if part is not None:
                parts[node] = part
        if cone([output.x], {linear.linear, *parts})[1] & {linear.linear}:
            raise NoProof("input and output projections differ in their number of channels")
        return list(parts.values())

    # ------------------------------------------------------------------ attention
    def _attention(self, output: Projection, met: set[fx.Node]) -> AttentionGroup:
        query: Any
        k: Any
        v: Any
        cores, caches = met & self.cores, met & self.caches
        if len(cores) > 1 or len(caches) > 1 or (cores and caches):
            raise NoProof("its input mixes several attention cores")
        core = next(iter(cores), None)
        if core is not None:
            if len(core.users) != 1 or met != {core}:
                raise NoProof("its input is more than the attention core's output")
            query, k, v = core.args[1:4]
            if k.target is operator.getitem and k.args[0] in self.caches:
                k, v = k.args[0].args[1:3]
            seen: tuple[fx.Node, ...] = ()
            heads = shape(query)[1]
        else:
            cache = next(iter(caches))
            k, v = cache.args[1:3]
            seen = tuple(n for n in self.graph.nodes if n.target is operator.getitem and n.args[0] is cache)
            heads, query = shape(k)[1], output.x
        kv_heads, width = shape(k)[1], shape(v)[3]
        if heads % kv_heads or output.in_features != heads * width:
            raise NoProof(f"{heads} query heads do not divide over {kv_heads} key/value heads")
        key_value = self._key_value(k, v)
        inputs: tuple[Projection, ...] = ()
        cut: tuple[fx.Node, ...] = seen
        if core is None:
            inputs = (self._written_out(output, met, cache, seen, heads, width),)
        else:
            prove_output(self.graph, output, core, heads, width)
            try:
                inputs = (self._head_projection("query", query, heads, shape(query)[3]),)
                prove_query(self.graph, inputs[0], query, heads, shape(query)[3])
                self._refuse_other_users(inputs[0].node, query, core)
            except (NoProof, CaptureError) as reason:
                self.whole_query, inputs, cut = str(reason), (), (query,)
        self._refuse_other_inputs([query, k, v])
        parts = [p for p in (*inputs, *key_value) if p.rows is not None]
        escaping = escapes(self.graph, parts) if inputs and inputs[0].rows is not None else None
        if escaping:
            raise NoProof(f"{parts[0].linear.name} is also used by {escaping}")
        return AttentionGroup(
            self._residual_before([inputs[0].x] if inputs else [query, k, v]),
            inputs,
            output,
            heads,
            width,
            core,
            cut,
            tuple(h // (heads // kv_heads) for h in range(heads)),
            key_value,
        )

    @staticmethod
    def _refuse_other_users(start: fx.Node, query: fx.Node, core: fx.Node) -> None:
        """What the query passes may reach nothing but the attention core."""
        passed = {start}
        between, _ = cone([query], {start})
        for node in (start, *start.graph.nodes):
            if node in between and any(i in passed for i in node.all_input_nodes):
                passed.add(node)
        for node in passed:
            outside = [u.name for u in node.users if u not in passed and u is not core and not carries_no_data(u)]
            if outside:
                raise NoProof(f"{node.name} is also used by {outside[0]}")

    def _key_value(self, k: fx.Node, v: fx.Node) -> tuple[Projection, ...]:
        """The projections of keys and values; where they are more than one each (adapters), all that they come from."""
        try:
            named = ("key", k), ("value", v)
            return tuple(self._head_projection(name, node, shape(node)[1], shape(node)[3]) for name, node in named)
        except NoProof:
            inside, _ = cone([k, v], set(self.stream))
            return tuple(p for p in self.by_node.values() if p.node in inside)

    def _head_projection(self, name: str, value: fx.Node, heads: int, width: int) -> Projection:
        """The projection, or the part of a fused one, that the query, key or value [B, heads, T, width] comes from."""
        _, met = cone([value], self.walls | set(self.stream))
        if len(met) != 1 or not met <= set(self.by_node):
            raise NoProof(f"the {name} does not come from one projection")
        whole = self.by_node[met.pop()]
        if whole.out_features == heads * width:
            return whole
        part = find_part(self.graph, whole, value, lambda n: _is_heads(n, heads, width))
        if part is None:
            raise NoProof(f"the {name} is no part of {whole.linear.name} that can be told apart (fused layout)")
        return part

    def _written_out(
        self, output: Projection, met: set[fx.Node], cache: fx.Node, seen: tuple[fx.Node, ...], heads: int, width: int
    ) -> Projection:
        """The query projection of an attention that is written out in the layer, proved separable with it."""
        linears = [self.by_node[n] for n in met if n in self.by_node]
        if len(linears) != 1 or met != {linears[0].node, cache} or len(seen) != 2:
            raise NoProof("its attention is written out and reads more than a query projection and the KV cache")
        query, region = linears[0], cone([output.x], {linears[0].node, *seen})[0] | {output.node}
        if query.out_features != heads * width:
            part = find_part(self.graph, query, output.x, lambda n: _is_heads(n, heads, width), seen)
            if part is None:
                raise NoProof(f"the query is no part of {query.linear.name} that can be told apart (fused layout)")
            query = part
            region = cone([output.x], {query.node, *seen})[0] | {output.node}
        masks = [n for n in region if is_mask(n)]
        if any(not n.meta["val"].is_floating_point() for n in masks):
            raise NoProof("its attention is written out with a mask that is not additive")
        for node in (query.node, *seen):
            outside = [u.name for u in node.users if u not in region]
            if outside:
                raise NoProof(f"{node.name} is also used by {outside[0]}")
        prove_written_out(self.graph, query, output, seen, heads, width)
        return query


def _is_heads(node: fx.Node, heads: int, width: int) -> bool:
    dims, axis = shape(node), head_axis(node)
    return dims[2:] == (heads * width,) if axis is None else (dims[axis], dims[3]) == (heads, width)  # type: ignore[index]
