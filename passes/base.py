"""What a pass is, what it works on, and the manager that runs passes in order (vocabulary of torch.fx.passes.infra)."""

from __future__ import annotations

import heapq
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..errors import PassError
from ..groups.group import Group, Groups
from ..groups.projections import Projection
from ..runtime import compensate, gather, history, model_calls, probe, rolling, select, shard_sum, split

logger = logging.getLogger(__name__)


@dataclass
class GroupNodes:
    """Nodes that passes inserted for one group, by role: `state`, `rows`, `probe_state`, `kept`, ...

    `reprobes`: whether the group can be probed again while decoding (its probe reads nothing but the residual).
    `factor_graph`, `gate`: of a gated MLP that decodes by step (`groups.gate`): its factor, and what that reads.
    `gram`: of attention, the Gram matrix of the probe.
    `whole_keys`: the probe reads the batch's keys and values, so that it runs behind their projections.
    """

    group: Group
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    probe_graph: fx.Graph | None = None
    factor_graph: fx.Graph | None = None
    gate: Projection | None = None
    reprobes: bool = False
    whole_keys: bool = False
    gram: fx.Node | None = None

    def name(self, role: str) -> str:
        return f"{self.group.kind}_{role}"


@dataclass(frozen=True)
class Cut:
    """What of a tensor parallel layer is cut into shards: paths of parameters inside the layer.

    Attributes:
        parameters: all DTensors, whole ones (a bias that is added behind the sum) among them.
        summed: weights cut by column: the linear layer's output is a partial one.
        size: how many shards there are.
    """

    parameters: frozenset[str]
    summed: frozenset[str]
    size: int


@dataclass
class BlockGraph:
    """A captured layer on its way through the passes.

    `inverted_mask`: the layer's boolean mask says True where a token may not attend. `cut`: of a tensor parallel layer.
    """

    graph: fx.Graph
    groups: Groups = field(default_factory=Groups)
    inserted: list[GroupNodes] = field(default_factory=list)
    layer: fx.Node | None = None
    plan: fx.Node | None = None
    real_rows: fx.Node | None = None
    inverted_mask: bool = False
    cut: Cut | None = None

    effects = frozenset(
        {
            model_calls.attention,  # gives its weights to who collects them
            model_calls.pruned_attention,  # likewise, where all heads run
            model_calls.kv_update,
            model_calls.call_module,
            probe.probe_source,
            select.choose_units,
            gather.rows_ahead,
            gather.gather_rows,
            gather.gather_columns,
            compensate.compensate,
            history.update_history,
            rolling.roll,
            rolling.adopt,
            split.join_rows,  # the first to ask for the columns of a rolling selection keeps them
            shard_sum.sum_of_shards,
        }
    )
    """Calls that do more than return a value (they write to the KV cache, what lies on it, the history, or what they
    are given): no pass may drop them, or take one for another that is equal."""

    def drop_unused(self) -> None:
        """Remove nodes without users, apart from the layer's arguments and calls with side effects."""
        self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or n.target in self.effects)

    def sort(self) -> None:
        """Move nodes behind what they read, and otherwise keep their order."""
        nodes = list(self.graph.nodes)
        place = {n: i for i, n in enumerate(nodes)}
        waits = {n: len(n.all_input_nodes) for n in nodes}
        ready = [place[n] for n in nodes if not waits[n]]
        while ready:
            node = nodes[heapq.heappop(ready)]
            self.graph._root.prepend(node)
            for user in node.users:
                waits[user] -= 1
                if not waits[user]:
                    heapq.heappush(ready, place[user])

    def argument(self, name: str) -> fx.Node | None:
        """The placeholder of one of the layer's arguments, or None."""
        return next((n for n in self.graph.nodes if n.op == "placeholder" and n.name == name), None)

    def call(self, function: Any, args: tuple, name: str, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """Insert a named call; `like` lends its fake tensor."""
        node = self.graph.create_node("call_function", function, args, kwargs, name=name)
        if like is not None and "val" in like.meta:
            node.meta["val"] = like.meta["val"]
        return node


@dataclass(frozen=True)
class PassResult:
    """How many places a pass changed, and why it left others alone."""

    matches: int
    reasons: tuple[str, ...] = ()


class Pass(ABC):
    """One step. `requires` names roles that earlier passes must have inserted, `ensures` those that it inserts."""

    requires: tuple[str, ...] = ()
    ensures: tuple[str, ...] = ()

    @abstractmethod
    def call(self, block: BlockGraph) -> PassResult:
        """Change `block` in place."""

    def __call__(self, block: BlockGraph) -> PassResult:
        """Run the pass between its conditions; the graph is sorted and linted.

        Raises:
            PassError: a role is missing before or after.
        """
        _check_roles(block, self.requires, f"{type(self).__name__} needs", "run the passes in order")
        result = self.call(block)
        block.sort()
        block.graph.lint()
        _check_roles(block, self.ensures, f"{type(self).__name__} did not insert", "mend the pass")
        return result


def _check_roles(block: BlockGraph, roles: tuple[str, ...], what: str, remedy: str) -> None:
    for inserted in block.inserted:
        missing = [role for role in roles if role not in inserted.nodes]
        if missing:
            raise PassError(f"{what} {', '.join(missing)} of {inserted.group.kind}; {remedy}")


class PassManager:
    """Runs passes in order, logs how often each matched, and returns the counts.

    With the logger `pp_fx.passes` at DEBUG, the graph is dumped after every pass.
    """

    def __init__(self, passes: list[Pass]) -> None:
        self.passes = passes

    def __call__(self, block: BlockGraph) -> dict[str, PassResult]:
        """Run them all; what one raises says in a note which pass it was and which ran before it."""
        results: dict[str, PassResult] = {}
        for step in self.passes:
            name = type(step).__name__
            try:
                results[name] = step(block)
            except Exception as error:
                error.add_note(f"in the graph pass {name}, after {', '.join(results) or 'none'}")
                raise
            logger.info("%s: %d matches", name, results[name].matches)
            logger.debug("after %s:\n%s", name, block.graph)
        return results
