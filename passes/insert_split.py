"""Let an engine's step run the tokens of prompts apart from its other tokens."""

from __future__ import annotations

from torch import fx

from ..groups.dataflow import is_parameter
from ..groups.group import MlpGroup
from ..runtime import gather, rolling, split
from .base import BlockGraph, GroupNodes, Pass, PassResult


class InsertSplit(Pass):
    """Of an MLP: the probe and the projections take the prompt tokens alone, and the other tokens join its output.

    That is right where between the projections nothing has a size of its own or reads another tensor of the batch; MLPs
    of other kinds stay as they are, and cannot be served under continuous batching.

    Args:
        rolls: the other tokens share a selection (`runtime.rolling`).
    """

    requires = ("state", "rows", "probe_residual", "probe_state", "kept", "branch_state", "output")

    def __init__(self, rolls: bool = False) -> None:
        self.rolls = rolls

    def call(self, block: BlockGraph) -> PassResult:
        matches = 0
        for inserted in block.inserted:
            inputs = next((n for n in inserted.nodes["kept"].users if n.target is gather.gather_rows), None)
            if isinstance(inserted.group, MlpGroup) and inputs is not None and _splits(inserted, inputs):
                self._split(block, inserted, inserted.group, inputs)
                if self.rolls:
                    self._roll(block, inserted, inserted.group)
                matches += 1
        return PassResult(matches)

    def _split(self, block: BlockGraph, inserted: GroupNodes, group: MlpGroup, inputs: fx.Node) -> None:
        nodes, output = inserted.nodes, inserted.nodes["output"]
        step = nodes.get("step")
        with block.graph.inserting_before(nodes["rows"]):
            args = (nodes["state"], nodes["rows"].args[1], block.plan)
            source = block.call(split.prompt_rows, args, inserted.name("prompt_residual"))
        for user in (nodes["rows"], nodes["probe_residual"]):
            user.replace_input_with(source.args[1], source)
        with block.graph.inserting_before(inputs):
            args = (nodes["state"], inputs.args[1], block.plan)
            inputs.update_arg(1, block.call(split.prompt_rows, args, inserted.name("prompt_rows"), inputs.args[1]))
        if step is not None:  # the gathers ask whether everything is done
            users = list(step.users)
            with block.graph.inserting_after(step):
                whole = block.call(
                    split.whole_step, (nodes["state"], block.plan, step), inserted.name("whole_step"), step
                )
            for user in users:
                user.replace_input_with(step, whole)
        with block.graph.inserting_after(output):
            args = (nodes["state"], block.plan, output, group.residual, nodes["probe_state"].args[2], *output.args[2:4])
            joined = block.call(split.join_rows, (*args, step), inserted.name("joined"), output)
        output.replace_all_uses_with(joined, lambda user: user is not joined)

    def _roll(self, block: BlockGraph, inserted: GroupNodes, group: MlpGroup) -> None:
        """What reads the selection reads it of a plan that has it."""
        nodes, kept, output = inserted.nodes, inserted.nodes["kept"], inserted.nodes["output"]
        parameters, weight = nodes["probe_state"].args[2], output.args[2]
        with block.graph.inserting_before(kept):
            args = (nodes["state"], block.plan, block.layer, group.residual, parameters, weight)
            plan = block.call(rolling.roll, args, inserted.name("rolled"))
        joined = next(n for n in output.users if n.target is split.join_rows)
        kept.update_arg(2, plan)
        with block.graph.inserting_before(joined):
            args = (nodes["state"], plan, block.layer, kept, output.kwargs["compensation"], weight)
            joined.update_arg(1, block.call(rolling.adopt, args, inserted.name("adopted")))


def _splits(inserted: GroupNodes, inputs: fx.Node) -> bool:
    """Whether what lies between the projections depends on them and on parameters alone, and the probe on its rows."""
    if len(inserted.nodes["probe_state"].args[1]) != 1:
        return False
    met: set[fx.Node] = set()
    waiting = [inserted.nodes["branch_state"]]
    while waiting:
        node = waiting.pop()
        if node is inputs or node in met or is_parameter(node) or node.target is gather.gather_vector:
            continue
        met.add(node)
        if node.op != "call_function":
            return False
        waiting += node.all_input_nodes
    return True
