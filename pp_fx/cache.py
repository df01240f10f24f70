"""What a generation keeps on its KV cache: the selection of every layer and, while decoding, the compact weights.

The selection lives on the cache object, never on the module, so that interleaved generations do not meet:

- `reorder_cache`, `batch_repeat_interleave`, `batch_select_indices`: one selection serves all samples, so it stays.
- `crop`: the selection stays while a token is left; an emptied or reset cache selects anew at its next call.
- `copy.deepcopy`: the copy shares the selection's tensors (nothing changes them) and goes its own way from there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .compact import CompactLinear
from .compensation import Compensation

_ATTRIBUTE = "pp_fx_selections"


class Selection:
    """Which units of one group of one layer run.

    Attributes:
        kept: int64 [k], the kept channels or heads, ascending.
        columns: int64 [k * width], the input columns of the output projection that they own.
        compensation: what stands in for the dropped units; None until computed, or without one. Once `output` holds
            its correction, the vector alone.
        former: (changed, selection before) where only the bool scalar `changed` tells, inside a compiled graph,
            whether this selection or the one before counts; None otherwise.
        version: of the layer's weights that it was made with.
        in_place: whether products read the kept rows where they lie (`pp_fx.kernels`).
        compacts: whether decode steps read compact weights; the first one gathers them.
        inputs: linear layers that hold the kept rows of the input projections, each with the numbers of rows of the
            projections stacked in it; None while not gathered.
        output: the kept columns of the output projection with the compensation in its bias, or None.
        window: [B, reprobe_every, H], the residual of the last decoded tokens, or None where nothing re-probes.
    """

    def __init__(self, kept: Tensor, columns: Tensor, version: int) -> None:
        self.kept = kept
        self.columns = columns
        self.version = version
        self.compensation: Compensation | None = None
        self.former: tuple[Tensor, Selection] | None = None
        self.in_place = False
        self.compacts = False
        self.inputs: list[tuple[CompactLinear, list[int]]] | None = None
        self.output: CompactLinear | None = None
        self.window: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Selection:
        """Shares the tensors, which nothing changes in place."""
        copied = Selection.__new__(Selection)
        copied.__dict__.update(self.__dict__)
        return copied


class Selections:
    """All selections of one generation.

    Attributes:
        owner: identity of the transform that made them.
        layers: layer index -> group name -> selection.
        batch, age: samples of the last call, and tokens decoded since the last probe; counted only where the
            configuration re-probes.
        reprobes: whether the present call re-probes.
    """

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.layers: dict[int, dict[str, Selection]] = {}
        self.batch = 0
        self.age = 0
        self.reprobes = False


def selections_on(cache: Any) -> Selections | None:
    """What this KV cache holds, or None."""
    return getattr(cache, _ATTRIBUTE, None)


def put_selections(cache: Any, owner: int) -> Selections:
    """What this KV cache holds, made empty where it held nothing of `owner`."""
    found = selections_on(cache)
    if found is None or found.owner != owner:
        found = Selections(owner)
        setattr(cache, _ATTRIBUTE, found)
    return found


def forget(cache: Any) -> None:
    """Drop the selections of a KV cache; its next call selects anew.

    Args:
        cache: a transformers Cache that a transformed model has used, or any other.
    """
    if selections_on(cache) is not None:
        setattr(cache, _ATTRIBUTE, None)


def compact_bytes(cache: Any) -> int:
    """Bytes of the compact weights that a KV cache holds (those shared with a deep copy are counted in both)."""
    found = selections_on(cache)
    if found is None:
        return 0
    held = [s for groups in found.layers.values() for s in groups.values()]
    pairs = [pair for s in held for pair in (*(linear for linear, _ in s.inputs or ()), s.output)]
    tensors = [t for pair in pairs if pair is not None for t in pair if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
