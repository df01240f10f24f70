"""A branch of a layer, from the residual to its intermediate state, as a graph of its own."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..groups.dataflow import ATTENTION_CORES, carries_no_data, cone, is_input, is_mask, shape
from ..runtime import model_calls


@dataclass(frozen=True)
class Branch:
    """The branch residual -> state, and what it reads.

    Attributes:
        graph: placeholders are the residual rows, `row_inputs`, the mask (if the branch `attends`), `keys`,
            `parameters`.
        row_inputs: other [B or 1, T, ...] tensors that the branch reads (rotary tables).
        keys: with `whole_keys` the batch's keys and values, as the KV cache gives them; else, or without any, empty.
        parameters: `get_attr` nodes of weights and modules.
        attends: whether there is an attention inside, whose mask is an input.
        mask: the batch's attention mask as the branch reads it, or None.
        window: the sliding window of the attention, or None.
        module: the attention module, or None where attention is written out.
    """

    graph: fx.Graph
    row_inputs: list[fx.Node]
    keys: list[fx.Node]
    parameters: list[fx.Node]
    attends: bool
    mask: Any
    window: Any
    module: Any

    @classmethod
    def extract(cls, source: fx.Graph, residual: fx.Node, state: fx.Node, whole_keys: bool) -> Branch:
        """Copy the branch out of a layer's graph, which stays as it is."""
        inside, _ = cone([state], {residual})
        keys = [n for n in source.nodes if whole_keys and n in inside and _is_key_or_value(n)]
        inside, _ = cone([state], {residual, *keys})
        ordered = [n for n in source.nodes if n in inside]
        body = [n for n in ordered if n.op == "call_function" and not _updates_cache(n) and not is_input(n)]
        needed: set[Any] = set()
        for node in body:
            needed.update(node.args[:4] if node.target in ATTENTION_CORES else node.all_input_nodes)
        for node in filter(_updates_cache, ordered):
            needed.update(node.args[1:3])
        inputs = [n for n in ordered if n in needed and is_input(n) and shape(n) is not None]
        masks = [n for n in inputs if is_mask(n)]
        cores = [n for n in body if n.target in ATTENTION_CORES]
        row_inputs = [n for n in inputs if n not in masks]
        parameters = [n for n in source.nodes if n in needed and n.op == "get_attr"]
        attends = bool(masks or cores)
        graph = fx.Graph()
        env: dict[Any, Any] = {residual: graph.placeholder("residual")}
        env.update({n: graph.placeholder(f"rows_{n.name}") for n in row_inputs})
        mask = graph.placeholder("mask") if attends else None
        env.update(dict.fromkeys(masks, mask))
        env.update({n: graph.placeholder(n.name) for n in (*keys, *parameters)})
        _copy(source, graph, env, inside, body, keys, mask)
        graph.output(env[state])
        graph.eliminate_dead_code()
        graph.lint()
        return cls(
            graph,
            row_inputs,
            keys,
            parameters,
            attends,
            cores[0].args[4] if cores else next(iter(masks), None),
            cores[0].kwargs.get("sliding_window") if cores else None,
            cores[0].args[0] if cores else None,
        )


def _copy(
    source: fx.Graph,
    graph: fx.Graph,
    env: dict[Any, Any],
    inside: Collection[fx.Node],
    body: Collection[fx.Node],
    keys: Collection[fx.Node],
    mask: fx.Node | None,
) -> None:
    """Copy the branch's calls; `env`, node -> its copy, has the inputs and gets the others."""
    hidden, residual = next(iter(source.nodes)), next(iter(graph.nodes))
    for node in source.nodes:
        if carries_no_data(node) and node.args[0] is hidden:  # sizes and dtype of the probe, not of the batch
            env[node] = graph.call_function(node.target, (residual, *node.args[1:]))
        elif carries_no_data(node) and node.args[0] in keys:
            env[node] = graph.node_copy(node, lambda n: env[n])
        elif node not in inside:
            continue
        elif _updates_cache(node):
            env[node] = tuple(env[a] for a in node.args[1:3])
        elif node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.target in ATTENTION_CORES:
            args = (*(env[a] for a in node.args[:4]), mask)
            plain = {k: v for k, v in node.kwargs.items() if not isinstance(v, fx.Node)}
            env[node] = graph.call_function(model_calls.probe_attention, args, plain)
        elif node in body:
            env[node] = graph.node_copy(node, lambda n: env[n])


def _updates_cache(node: fx.Node) -> bool:
    return node.target is model_calls.kv_update


def _is_key_or_value(node: fx.Node) -> bool:
    """An item of what the KV cache returns."""
    origin = node.args[0] if node.target is operator.getitem else None
    return isinstance(origin, fx.Node) and _updates_cache(origin)
