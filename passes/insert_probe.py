"""Look ahead: the probe branch."""

from __future__ import annotations

from ..runtime import plan, probe, real_rows
from ..runtime.names import LAYER, state_name
from .base import BlockGraph, GroupNodes, Pass, PassResult
from .branch import Branch


class InsertProbe(Pass):
    """The probe branch: choose rows of the residual, take them, run them through a copy of the branch.

    The copy is a graph of its own with the weights as arguments, so that one function serves all layers.

    Args:
        whole_keys: the probe rows of an attention branch are queries alone and attend to the batch's own keys and
            values, which no pruning touches; else they attend to each other (paper, section 3.1).
    """

    ensures = ("state", "rows", "probe_residual", "probe_state")

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
            forwarded = next((n for n in block.graph.nodes if str(n.target).startswith("**")), None)
            args = (block.layer, hidden, cache, forwarded)
            block.plan = block.call(plan.plan_call, args, "plan")
            args = (hidden, block.argument("attention_mask"), block.plan, block.layer, block.inverted_mask)
            block.real_rows = block.call(real_rows.real_rows, args, "real_rows")

    def _insert(self, block: BlockGraph, inserted: GroupNodes) -> None:
        group, nodes = inserted.group, inserted.nodes
        extracted = Branch.extract(block.graph, group.residual, group.state, self.whole_keys)
        inserted.probe_graph, inserted.whole_keys = extracted.graph, bool(extracted.keys)
        entries = {*group.entries}
        first = next(n for n in block.graph.nodes if n in entries)
        with block.graph.inserting_before(extracted.keys[-1].next if extracted.keys else first):
            nodes["state"] = block.graph.get_attr(state_name(group.kind))
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
