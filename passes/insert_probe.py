from __future__ import annotations

import operator

from torch import fx

from .. import plan, probe, runtime
from ..dataflow import ATTENTION_CORES, carries_no_data, cone, is_input, is_mask, shape
from ..exported import LAYER
from .base import BlockGraph, GroupNodes, Pass, PassResult


class InsertProbe(Pass):
    """The probe branch: choose rows of the residual, take them, run them through a copy of the branch.

    The copy is a graph of its own with the weights as arguments, so that one function serves all layers.

    Args:
        whole_keys: the probe rows of an attention branch are queries alone and attend to the batch's own keys and
            values, which no pruning touches; else they attend to each other (paper, section 3.1).
    """

    def __init__(self, whole_keys: bool = True) -> None:
        self.whole_keys = whole_keys

    def call(self, block: BlockGraph) -> PassResult:
        if block.inserted:
            self._insert_plan(block)
        for inserted in block.inserted:
            self._insert(block, inserted)
        return PassResult(len(block.inserted))

    def _insert_plan(self, block: BlockGraph) -> None:
        hidden = next(iter(block.graph.nodes))
        first_call = next(n for n in block.graph.nodes if n.op == "call_function")
        with block.graph.inserting_before(first_call):
            block.layer = block.graph.get_attr(LAYER)
            cache = next((n for n in block.graph.nodes if n.meta.get("kv_cache")), None)
            args = (block.layer, hidden, cache)
            block.plan = block.call(plan.plan_call, args, "plan")
            args = (hidden, block.argument("attention_mask"), block.plan, block.layer, block.inverted_mask)
            block.real_rows = block.call(runtime.real_rows, args, "real_rows")

    def _insert(self, block: BlockGraph, inserted: GroupNodes) -> None:
        group, nodes = inserted.group, inserted.nodes
        extracted = extract_branch(block.graph, group.residual, group.state, self.whole_keys)
        inserted.probe_graph, inserted.whole_keys = extracted.graph, bool(extracted.keys)
        entries = {*group.entries}
        first = next(n for n in block.graph.nodes if n in entries)
        with block.graph.inserting_before(extracted.keys[-1].next if extracted.keys else first):
            nodes["state"] = block.graph.get_attr(f"pp_{group.kind}")
            source = group.residual
            if not extracted.row_inputs and not extracted.attends:  # else a re-probe would need more than the residual
                inserted.reprobes = True
                source = block.call(
                    probe.probe_source, (nodes["state"], source, block.plan, block.layer), inserted.name("probe_source")
                )
            args = (nodes["state"], source, block.real_rows, block.plan)
            nodes["rows"] = block.call(probe.choose_rows, args, inserted.name("probe_rows"))
            taken = [
                block.call(probe.take_rows, (n, nodes["rows"]), inserted.name(f"probe_{label}"))
                for label, n in [("residual", source), *((n.name, n) for n in extracted.row_inputs)]
            ]
            nodes["probe_residual"] = taken[0]
            if extracted.keys:
                args = (
                    nodes["rows"],
                    extracted.mask,
                    taken[0],
                    extracted.keys[0],
                    block.plan,
                    extracted.window,
                    extracted.module,
                )
                mask = block.call(probe.query_mask, args, inserted.name("probe_mask"))
                samples = ((n, nodes["rows"]) for n in extracted.keys)
                taken += [
                    mask,
                    *(block.call(probe.take_samples, s, inserted.name(f"probe_{s[0].name}")) for s in samples),
                ]
            elif extracted.attends:
                mask = block.call(probe.probe_mask, (nodes["rows"], taken[0]), inserted.name("probe_mask"))
                taken.append(mask)
            parameters = tuple(block.graph.get_attr(str(p.target)) for p in extracted.parameters)
            nodes["probe_state"] = block.call(
                probe.probe_state, (nodes["state"], tuple(taken), parameters), inserted.name("probe_state")
            )


class extract_branch:
    """The branch residual -> state as a graph of its own.

    Attributes:
        graph: placeholders are the residual rows, `row_inputs`, the mask (if the branch `attends`), `keys`,
            `parameters`.
        row_inputs: other [B or 1, T, ...] tensors that the branch reads (rotary tables).
        keys: with `whole_keys` the batch's keys and values, as the KV cache gives them; else, or without any, empty.
        mask: the batch's attention mask as the branch reads it, or None.
        window: the sliding window of the attention, or None.
        module: the attention module, or None where attention is written out.
        parameters: `get_attr` nodes of weights and modules.
    """

    def __init__(self, source: fx.Graph, residual: fx.Node, state: fx.Node, whole_keys: bool) -> None:
        hidden = next(iter(source.nodes))
        inside, _ = cone([state], {residual})
        self.keys = [n for n in source.nodes if whole_keys and n in inside and _is_key_or_value(n)]
        inside, _ = cone([state], {residual, *self.keys})
        ordered = [n for n in source.nodes if n in inside]
        skipped = {runtime.kv_update}
        body = [n for n in ordered if n.op == "call_function" and n.target not in skipped and not is_input(n)]
        needed: set[fx.Node] = set()
        for node in body:
            needed.update(node.args[:4] if node.target in ATTENTION_CORES else node.all_input_nodes)
        for node in ordered:
            if node.target is runtime.kv_update:
                needed.update(node.args[1:3])  # type: ignore[arg-type]
        inputs = [n for n in ordered if n in needed and is_input(n) and shape(n) is not None]
        masks = [n for n in inputs if is_mask(n)]
        self.row_inputs = [n for n in inputs if n not in masks]
        self.parameters = [n for n in source.nodes if n in needed and n.op == "get_attr"]
        cores = [n for n in body if n.target in ATTENTION_CORES]
        self.attends = bool(masks or cores)
        self.mask = cores[0].args[4] if cores else next(iter(masks), None)
        self.module = cores[0].args[0] if cores else None
        self.window = cores[0].kwargs.get("sliding_window") if cores else None

        self.graph = fx.Graph()
        env: dict[fx.Node, object] = {residual: self.graph.placeholder("residual")}
        for n in self.row_inputs:
            env[n] = self.graph.placeholder(f"rows_{n.name}")
        mask = self.graph.placeholder("mask") if self.attends else None
        env.update(dict.fromkeys(masks, mask))
        for n in self.keys:
            env[n] = self.graph.placeholder(n.name)
        for n in self.parameters:
            env[n] = self.graph.placeholder(n.name)
        for node in source.nodes:
            if carries_no_data(node) and node.args[0] is hidden:  # sizes and dtype of the probe, not of the batch
                env[node] = self.graph.call_function(node.target, (env[residual], *node.args[1:]))  # type: ignore[arg-type]
            elif carries_no_data(node) and node.args[0] in self.keys:
                env[node] = self.graph.node_copy(node, lambda n: env[n])  # type: ignore[arg-type,return-value]
            elif node not in inside:
                continue
            elif node.target is runtime.kv_update:
                env[node] = tuple(env[a] for a in node.args[1:3])  # type: ignore[index]
            elif node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple):  # type: ignore[arg-type]
                env[node] = env[node.args[0]][node.args[1]]  # type: ignore[index]
            elif node.target in ATTENTION_CORES:
                args = (*(env[a] for a in node.args[:4]), mask)  # type: ignore[index]
                plain = {k: v for k, v in node.kwargs.items() if not isinstance(v, fx.Node)}
                env[node] = self.graph.call_function(runtime.probe_attention, args, plain)  # type: ignore[arg-type]
            elif node in body:
                env[node] = self.graph.node_copy(node, lambda n: env[n])  # type: ignore[arg-type,return-value]
        self.graph.output(env[state])  # type: ignore[arg-type]
        self.graph.eliminate_dead_code()
        self.graph.lint()


def _is_key_or_value(node: fx.Node) -> bool:
    """An item of what the KV cache returns."""
    origin = node.args[0] if node.target is operator.getitem else None
    return isinstance(origin, fx.Node) and origin.target is runtime.kv_update
