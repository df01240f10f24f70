"""Channel groups: which weights' rows and columns fall together, found by dataflow. No names are looked at.

An `MlpGroup` is a set of input projections whose outputs meet only pointwise ops before one output projection. An
`AttentionGroup` is an attention core and an output projection whose heads are proved separable by running the graph on
small tensors, and the query projection where its rows are the heads'. What cannot be proved is left dense, with the
reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from ..config import Kind
from .projections import Projection


@dataclass(frozen=True)
class Group:
    """What both kinds share.

    Attributes:
        residual: the [B, T, H] node before the branch's norm.
        inputs: projections of which only the kept units' rows run; all read the same input.
        output: the projection of which only the kept units' columns run.
        units: how many channels or query heads there are.
        width: columns of `output` that one unit owns.
    """

    residual: fx.Node
    inputs: tuple[Projection, ...]
    output: Projection
    units: int
    width: int
    kind: ClassVar[Kind]

    @property
    def state(self) -> fx.Node:
        """The output projection's input."""
        return self.output.x

    @property
    def whole(self) -> tuple[Projection, ...]:
        """Other parts of the fused input projections: they run, with all their rows."""
        return ()

    @property
    def read(self) -> tuple[Projection, ...]:
        """Every projection that the state depends on."""
        return (*self.inputs, *self.whole)

    @property
    def entries(self) -> tuple[fx.Node, ...]:
        """The nodes from which on only the kept units run."""
        return tuple(p.linear for p in self.inputs)

    def kept_share(self, path: str, kept: int) -> float:
        """Share of the weight at `path` that runs when `kept` units are kept."""
        dropped = sum(p.share for p in (*self.inputs, self.output) if p.path == path)
        return 1 - dropped * (1 - kept / self.units)

    @property
    def weights(self) -> tuple[str, ...]:
        """Paths of the weights that shrink with the kept units, inside the layer."""
        return tuple(dict.fromkeys(p.path for p in (*self.inputs, self.output)))

    @property
    def gathered_by_column(self) -> tuple[str, ...]:
        """Paths of the parameters of which columns are gathered."""
        inputs = [p for p in self.inputs if p.transposed]
        return tuple(dict.fromkeys(p.path for p in (*inputs, *([] if self.output.transposed else [self.output]))))


@dataclass(frozen=True)
class MlpGroup(Group):
    """Coupled channels of an MLP. `vectors` are parameters [C] that meet them between the projections."""

    vectors: tuple[fx.Node, ...] = ()
    kind: ClassVar[Kind] = "mlp"


@dataclass(frozen=True)
class AttentionGroup(Group):
    """Query heads. `inputs` is the query projection, or empty where its rows are not the heads'.

    Attributes:
        core: the attention call, or None where the layer writes its attention out.
        cut: [B, heads, ..] nodes that are whole and of which the attention reads the kept heads: the query of an
            unpruned projection; keys and values of an attention that is written out.
        kv_head: for every query head the key/value head that it reads.
        key_value: the projections of keys and values; all their rows run.
    """

    core: fx.Node | None = None
    cut: tuple[fx.Node, ...] = ()
    kv_head: tuple[int, ...] = ()
    key_value: tuple[Projection, ...] = ()
    kind: ClassVar[Kind] = "attention"

    @property
    def whole(self) -> tuple[Projection, ...]:
        fused = {p.linear for p in self.inputs}
        return tuple(p for p in self.key_value if p.linear in fused)

    @property
    def read(self) -> tuple[Projection, ...]:
        return (*self.inputs, *self.key_value)

    @property
    def entries(self) -> tuple[fx.Node, ...]:
        ends = (*self.cut, *(() if self.core is None else (self.core,)))
        return (*super().entries, *ends)


@dataclass
class Groups:
    """The groups of one structure, and the reason for each branch that is left dense."""

    mlp: MlpGroup | None = None
    attention: AttentionGroup | None = None
    reasons: list[str] = field(default_factory=list)

    @property
    def found(self) -> list[Group]:
        return [g for g in (self.attention, self.mlp) if g is not None]
