"""What a generation keeps on its KV cache: the selection of every layer and, while decoding, the compact weights.

The selection lives on the cache object, never on the module, so that interleaved generations do not meet. Its tensors
are written in place from prompt to prompt (`buffers`), so that compiled decode steps find them where they were:

- `reorder_cache`, `batch_repeat_interleave`, `batch_select_indices`: one selection serves all samples, so it stays.
- `crop`: the selection stays while a token is left; an emptied or reset cache selects anew at its next call.
- `copy.deepcopy`: the copy has tensors of its own (packed weights, which nothing writes to, are shared).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..layouts import stored_bytes
from ..methods import Compensation
from .buffers import keep, own
from .compact import CompactLinear, make_compact
from .names import SELECTIONS

Inputs = list[tuple[CompactLinear, list[int]]]
"""Linear layers that hold rows of input projections, each with the numbers of rows of the projections stacked in it."""


class Selection:
    """Which units of one group of one layer run, and what is kept for it. Nobody but its own methods writes to it.

    Attributes:
        kept: int64 [k], the kept channels or heads, ascending.
        columns: int64 [k * width], the input columns of the output projection that they own.
        version: of the layer's weights that it was made with.
        holds: its tensors outlive the call in memory of their own (`buffers`), for the decode steps to come.
        exports: it belongs to an exported graph, whose tensors nothing keeps.
        current: it counts; False once the cache was emptied (`forget`), while its tensors wait for the next prompt.
        changed: bool scalar where only a tensor tells, inside a compiled graph, whether this selection or the one
            before counts: what is made for it replaces what is there only where it is true. None otherwise.
        compensation: what stands in for the dropped units; None until computed, without one, or once `output` holds it.
        in_place: whether products read the kept rows where they lie (`pp_fx.kernels`).
        compacts: whether decode steps read compact weights.
        inputs: what holds the kept rows of the input projections; None before they were gathered.
        output: the kept columns of the output projection with the compensation in its weight and bias, or None.
        inputs_due, output_due: whether they have to be gathered for the present choice.
        uncompensated: whether the present choice has no compensation yet.
        folds: whether the compensation can go into compact weights; quantized ones take no correction.
    """

    def __init__(
        self, kept: Tensor, columns: Tensor, version: int, *, holds: bool = False, exports: bool = False
    ) -> None:
        self.kept = own(kept) if holds else kept
        self.columns = self.kept if columns is kept else own(columns) if holds else columns
        self.version = version
        self.holds = holds
        self.exports = exports
        self.current = True
        self.changed: Tensor | None = None
        self.compensation: Compensation | None = None
        self.in_place = False
        self.compacts = False
        self.inputs: Inputs | None = None
        self.output: CompactLinear | None = None
        self.inputs_due = True
        self.output_due = True
        self.uncompensated = True
        self.folds = True

    @classmethod
    def given(
        cls, kept: Tensor, columns: Tensor, version: int, inputs: list[CompactLinear], output: CompactLinear
    ) -> Selection:
        """One of an exported graph whose compact weights came with the call."""
        made = cls(kept, columns, version, exports=True)
        made.compacts = True
        made.inputs_due = made.output_due = made.uncompensated = False
        made.inputs, made.output = [(linear, [linear.weight.shape[0]]) for linear in inputs], output
        return made

    def choose(self, kept: Tensor, columns: Tensor, version: int, changed: Tensor | None) -> None:
        """Take other units; where the bool scalar `changed` is given and false, only seem to."""
        narrow = columns is kept
        self.kept = keep(self.kept, kept, changed)
        self.columns = self.kept if narrow else keep(self.columns, columns, changed)
        self.version, self.changed, self.current = version, changed, True
        self.inputs_due = self.output_due = self.uncompensated = True

    def read_weights(self, compact: bool, in_place: bool) -> None:
        """How the products of this choice read the weights: `compacts`, `in_place`."""
        self.compacts, self.in_place = compact, in_place

    def want_compact(self) -> None:
        """From now on decode steps read compact weights; the next call gathers them."""
        self.compacts = self.inputs_due = self.output_due = True

    def settle(self) -> None:
        """What the choice asked for is made: from now on it counts."""
        self.changed = None

    def forget(self) -> None:
        """The cache was emptied: the choice no longer counts, its memory waits for the next one."""
        self.current = False

    def compensate(self, made: Compensation, folds: bool) -> Compensation:
        """Keep what stands in for the dropped units; compact weights will take it in if it `folds`."""
        old, self.folds = self.compensation, folds
        if self.changed is not None and not (self.output is not None and folds) and old is not None:
            made = made.where(self.changed, old)
        self.uncompensated = False
        self.compensation = _kept(made, old) if self.holds and not (self.compacts and folds) else made
        return self.compensation

    def pass_inputs(self, linears: list[CompactLinear]) -> None:
        """Of an exported graph: the compact weights leave it as they were gathered."""
        self.inputs = [(linear, [linear.weight.shape[0]]) for linear in linears]

    def hold_inputs(self, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> CompactLinear:
        """Keep the stacked rows of the input projections [sum of sizes, H] as decode steps read them."""
        old = self.inputs[0][0] if self.inputs else None
        linear = make_compact(weight, bias, old)  # the rows follow `kept`, whichever counts
        self.inputs, self.inputs_due = [(linear, sizes)], False
        return linear

    def hold_input(self, weight: Tensor, bias: Tensor | None, position: int) -> CompactLinear:
        """Keep the rows of one input projection [k, H] by itself."""
        held = [] if self.inputs is None else self.inputs
        old = held[position][0] if position < len(held) else None
        made = make_compact(weight, bias, old), [weight.shape[0]]
        self.inputs, self.inputs_due = [*held[:position], made, *held[position + 1 :]], False
        return made[0]

    def hold_output(self, weight: Tensor, bias: Tensor | None) -> CompactLinear:
        """Keep the kept columns of the output projection [H, k], the compensation included if it `folds`."""
        exports = self.exports  # the graph's runtime has a layout of its own
        made = CompactLinear(weight, bias) if exports else make_compact(weight, bias, self.output, self.changed)
        self.output, self.output_due, self.changed = made, False, None
        if self.folds:
            self.compensation = None
        return made


def _kept(made: Compensation, old: Compensation | None) -> Compensation:
    """A compensation in the memory of the old one where it fits there (`buffers`)."""
    vector = keep(None if old is None else old.vector, made.vector)
    if made.correction is None:
        return Compensation(vector, None)
    former = None if old is None else old.correction
    if former is None or len(former) != len(made.correction):
        return Compensation(vector, tuple(own(factor) for factor in made.correction))
    return Compensation(vector, tuple(map(keep, former, made.correction)))


class Selections:
    """All selections of one generation.

    Attributes:
        owner: identity of the transform that made them.
        layers: layer index -> group name -> selection.
        windows: layer index -> group name -> [B, reprobe_every, H], the residual of the last decoded tokens; only
            where the configuration re-probes.
        given: the cache came from the caller, so that decoding may follow: prompts keep compact weights. A cache that
            a plain forward makes for itself holds indices alone until a decode step wants more.
        batch, age: samples of the last call, and tokens decoded (in an engine: steps that decoded) since the last
            probe; counted only where the configuration re-probes.
        reprobes: whether the present call re-probes.
        reserved: the batch size that `reserve` made it for, or None.
    """

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.layers: dict[int, dict[str, Selection]] = {}
        self.windows: dict[int, dict[str, Tensor]] = {}
        self.given = False
        self.batch = 0
        self.age = 0
        self.reprobes = False
        self.reserved: int | None = None

    def all(self) -> Iterator[Selection]:
        """Every selection, in layer order."""
        return (selection for groups in self.layers.values() for selection in groups.values())


def selections_on(cache: Any) -> Selections | None:
    """What this KV cache holds, or None."""
    return getattr(cache, SELECTIONS, None)


def put_selections(cache: Any, owner: int) -> Selections:
    """What this KV cache holds, made empty where it held nothing of `owner`."""
    found = selections_on(cache)
    if found is None or found.owner != owner:
        found = Selections(owner)
        setattr(cache, SELECTIONS, found)
    return found


def forget(cache: Any) -> None:
    """Drop the selections of a KV cache; its next call selects anew, into the same memory.

    Args:
        cache: a transformers Cache that a transformed model has used, or any other.
    """
    found = selections_on(cache)
    if found is not None:
        found.batch, found.age, found.reprobes = 0, 0, False
        for selection in found.all():
            selection.forget()


def compact_bytes(cache: Any) -> int:
    """Bytes of the compact weights that a KV cache holds (those shared with a deep copy are counted in both)."""
    found = selections_on(cache)
    if found is None:
        return 0
    pairs = [pair for s in found.all() for pair in (*(linear for linear, _ in s.inputs or ()), s.output)]
    tensors = [t for pair in pairs if pair is not None for t in pair if isinstance(t, Tensor)]
    return sum(map(stored_bytes, tensors))
