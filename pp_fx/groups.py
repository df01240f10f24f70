"""Channel groups: which weights' rows and columns fall together, found by dataflow. No names are looked at.

An `MlpGroup` is a set of input projections whose outputs meet only pointwise ops before one output projection. An
`AttentionGroup` is a query projection, an attention core and an output projection whose heads are proved separable by
running the graph on small tensors. What cannot be proved is left dense, with the reason.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from . import runtime
from .dataflow import Execution, cone, is_parameter, residual_stream, shape
from .errors import CaptureError

aten = torch.ops.aten


@dataclass(frozen=True)
class Projection:
    """A linear layer in the graph: y = x @ weight.T + bias. Taken before any pass changes the node."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @classmethod
    def of(cls, node: fx.Node) -> Projection:
        return cls(node, *node.args[:2], node.args[2] if len(node.args) > 2 else None)  # type: ignore[arg-type,call-arg]

    @property
    def out_features(self) -> int:
        return self.weight.meta["val"].shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.meta["val"].shape[1]

    @property
    def module(self) -> str:
        """Path of the module that holds the weight, inside the layer."""
        return str(self.weight.target).rpartition(".")[0]

    @property
    def label(self) -> str:
        """Short name for nodes and tables: `gate` for `mlp.gate_proj`."""
        return self.module.rpartition(".")[2].removesuffix("_proj")


@dataclass(frozen=True)
class Group:
    """What both kinds share.

    `units` is what is kept or dropped (channels, query heads), `width` the input columns of `output` that one unit
    owns, `residual` the [B, T, H] node before the branch's norm, `state` the output projection's input.
    """

    kind: str
    residual: fx.Node
    inputs: tuple[Projection, ...]
    output: Projection
    units: int
    width: int

    @property
    def state(self) -> fx.Node:
        return self.output.x

    @property
    def weights(self) -> tuple[str, ...]:
        """Paths of the weights that are gathered, inside the layer."""
        return tuple(str(p.weight.target) for p in (*self.inputs, self.output))


@dataclass(frozen=True)
class MlpGroup(Group):
    """Coupled channels of an MLP."""


@dataclass(frozen=True)
class AttentionGroup(Group):
    """Query heads. `inputs` is the query projection alone; `kv_head[h]` is the key/value head that head h reads."""

    core: fx.Node
    kv_head: tuple[int, ...]
    key_value: tuple[Projection, ...]


@dataclass
class Groups:
    """The groups of one structure, every projection, and the reason for each branch that is left dense."""

    mlp: MlpGroup | None = None
    attention: AttentionGroup | None = None
    projections: list[Projection] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def found(self) -> list[Group]:
        return [g for g in (self.attention, self.mlp) if g is not None]


class _NoProof(Exception):
    pass


def find_groups(graph: fx.Graph) -> Groups:
    """The channel groups of a captured layer."""
    result = Groups()
    result.projections = [
        Projection.of(n) for n in graph.nodes if n.target is aten.linear.default and is_parameter(n.args[1])
    ]
    finder = _Finder(graph, result.projections)
    for projection in result.projections:
        try:
            group = finder.group_of(projection)
        except (_NoProof, CaptureError) as reason:
            result.reasons.append(f"{projection.module}: {reason}")
            continue
        if isinstance(group, MlpGroup):
            result.mlp = group
        elif isinstance(group, AttentionGroup):
            result.attention = group
    for kind, group in (("MLP", result.mlp), ("attention", result.attention)):
        if group is None and not result.reasons:
            result.reasons.append(f"no {kind} group: its projections are no plain linear layers")
    return result


class _Finder:
    def __init__(self, graph: fx.Graph, projections: list[Projection]) -> None:
        self.graph = graph
        self.by_node = {p.node: p for p in projections}
        self.cores = {n for n in graph.nodes if n.target is runtime.attention}
        self.caches = {n for n in graph.nodes if n.target is runtime.kv_update}
        self.walls = {*self.by_node, *self.cores, *self.caches}
        self.stream = residual_stream(graph, self.walls)

    def group_of(self, output: Projection) -> Group | None:
        """The group whose output projection this is, or None if it reads the residual stream."""
        _, met = cone([output.x], self.walls | set(self.stream))
        if any(m in self.stream for m in met):
            return None
        cores = [m for m in met if m in self.cores]
        if cores:
            return self._attention(output, cores)
        return self._mlp(output, [self.by_node[n] for n in self.graph.nodes if n in met and n in self.by_node])

    def _residual_before(self, x: fx.Node) -> fx.Node:
        _, met = cone([x], set(self.stream) | self.walls)
        if len(met) != 1:
            raise _NoProof(f"{x.name} does not come from one point of the residual stream")
        return met.pop()

    def _mlp(self, output: Projection, inputs: list[Projection]) -> MlpGroup:
        if len({p.x for p in inputs}) != 1:
            raise _NoProof("its input projections read different inputs")
        channels = output.in_features
        if any(p.out_features != channels for p in inputs):
            raise _NoProof("input and output projections differ in their number of channels (fused layout)")
        inside, _ = cone([output.x], {p.node for p in inputs})
        between = [n for n in self.graph.nodes if n in inside]  # graph order: the same reason at every run
        for node in between:
            if is_parameter(node):
                raise _NoProof(f"{node.name} is a parameter between the projections")
            if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
                raise _NoProof(f"{node.name} between the projections is not pointwise")
            if (shape(node) or (channels,))[-1] not in (channels, 1):
                raise _NoProof(f"{node.name} between the projections changes the channel axis")
        inside.add(output.node)
        for node in (*between, *(p.node for p in inputs)):
            escaping = [u.name for u in node.users if u not in inside]
            if escaping:
                raise _NoProof(f"{node.name} is also used by {escaping[0]}")
        return MlpGroup("mlp", self._residual_before(inputs[0].x), tuple(inputs), output, channels, 1)

    def _attention(self, output: Projection, cores: list[fx.Node]) -> AttentionGroup:
        if len(cores) != 1 or len(cores[0].users) != 1:
            raise _NoProof("its input mixes several attention cores")
        core = cores[0]
        q, k, v = core.args[1:4]
        if k.target is operator.getitem and k.args[0] in self.caches:
            k, v = k.args[0].args[1:3]
        heads, kv_heads, width = shape(q)[1], shape(k)[1], shape(v)[3]
        if heads % kv_heads or shape(q)[3] * heads != heads * width:
            raise _NoProof(f"{heads} query heads do not divide over {kv_heads} key/value heads")
        projections = []
        for name, node in (("query", q), ("key", k), ("value", v)):
            _, met = cone([node], self.walls | set(self.stream))
            if len(met) != 1 or not met <= set(self.by_node):
                raise _NoProof(f"the {name} does not come from one projection")
            projections.append(self.by_node[met.pop()])
        query = projections[0]
        if len(set(projections)) != 3 or query.out_features != heads * width:
            raise _NoProof("query, key and value share a projection (fused layout)")
        self._prove_output(output, core, heads, width)
        self._prove_query(query, q, heads, width)
        return AttentionGroup(
            "attention",
            self._residual_before(query.x),
            (query,),
            output,
            heads,
            width,
            core,
            tuple(h // (heads // kv_heads) for h in range(heads)),
            tuple(projections[1:]),
        )

    def _prove_output(self, output: Projection, core: fx.Node, heads: int, width: int) -> None:
        """Column h * width + d of the output projection must read element d of head h, and nothing else."""
        run = Execution(self.graph)
        code = torch.arange(run.batch * run.length * heads * width, dtype=torch.float64)
        code = code.view(run.batch, run.length, heads, width)
        (columns,) = run.run([output.x], {core: code})
        if not torch.equal(columns, code.flatten(2)):
            raise _NoProof("the attention output is rearranged before the output projection")
        kept = torch.arange(heads)[: max(1, heads - 1)]
        (columns,) = run.run([output.x], {core: code.index_select(2, kept)})
        if not torch.equal(columns, code.index_select(2, kept).flatten(2)):
            raise _NoProof("the number of heads is a constant behind the attention core")

    def _prove_query(self, query: Projection, q: fx.Node, heads: int, width: int) -> None:
        """Running the rows of some heads must give exactly those heads of the full run."""
        run = Execution(self.graph)
        full = torch.rand(run.batch, run.length, heads, width, dtype=torch.float64, generator=run.generator)
        (whole,) = run.run([q], {query.node: full.flatten(2)})
        for kept in (torch.arange(1, heads), torch.arange(heads - 1), torch.arange(0, heads, 2)):
            if kept.numel() == 0:
                continue
            try:
                (part,) = run.run([q], {query.node: full.index_select(2, kept).flatten(2)})
            except (RuntimeError, IndexError):
                raise _NoProof("the number of heads is a constant between the query projection and the core") from None
            if not torch.equal(part, whole.index_select(1, kept)):
                raise _NoProof("the query heads are not separable (something mixes them before the core)")
