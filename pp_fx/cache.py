"""What a generation keeps on its KV cache: the selection of every layer and, while decoding, the compact weights.

The selection lives on the cache object, never on the module, so that interleaved generations do not meet. Its tensors
are written in place from prompt to prompt (`pp_fx.buffers`), so that compiled decode steps find them where they were:

- `reorder_cache`, `batch_repeat_interleave`, `batch_select_indices`: one selection serves all samples, so it stays.
- `crop`: the selection stays while a token is left; an emptied or reset cache selects anew at its next call.
- `copy.deepcopy`: the copy has tensors of its own (packed weights, which nothing writes to, are shared).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from .arguments import check_integers
from .buffers import keep, own
from .compact import CompactLinear, store
from .compensation import Compensation
from .errors import InputError, StateError

_ATTRIBUTE = "pp_fx_selections"


class Selection:
    """Which units of one group of one layer run.

    Attributes:
        kept: int64 [k], the kept channels or heads, ascending.
        columns: int64 [k * width], the input columns of the output projection that they own.
        version: of the layer's weights that it was made with.
        holds: its tensors outlive the call in memory of their own (`pp_fx.buffers`), for the decode steps to come.
        exports: it belongs to an exported graph, whose tensors nothing keeps.
        current: it counts; False once the cache was emptied (`forget`), while its tensors wait for the next prompt.
        changed: bool scalar where only a tensor tells, inside a compiled graph, whether this selection or the one
            before counts: what is made for it replaces what is there only where it is true. None otherwise.
        compensation: what stands in for the dropped units; None until computed, without one, or once `output` holds it.
        in_place: whether products read the kept rows where they lie (`pp_fx.kernels`).
        compacts: whether decode steps read compact weights.
        inputs: linear layers that hold the kept rows of the input projections, each with the numbers of rows of the
            projections stacked in it; None before they were gathered.
        output: the kept columns of the output projection with the compensation in its weight and bias, or None.
        inputs_due, output_due: whether they have to be gathered for the present choice.
        uncompensated: whether the present choice has no compensation yet.
    """

    def __init__(self, kept: Tensor, columns: Tensor, version: int, holds: bool = False) -> None:
        self.kept = own(kept) if holds else kept
        self.columns = self.kept if columns is kept else own(columns) if holds else columns
        self.version = version
        self.holds = holds
        self.exports = False
        self.current = True
        self.changed: Tensor | None = None
        self.compensation: Compensation | None = None
        self.in_place = False
        self.compacts = False
        self.inputs: list[tuple[CompactLinear, list[int]]] | None = None
        self.output: CompactLinear | None = None
        self.inputs_due = True
        self.output_due = True
        self.uncompensated = True

    def choose(self, kept: Tensor, columns: Tensor, version: int, changed: Tensor | None) -> None:
        """Take other units; where the bool scalar `changed` is given and false, only seem to."""
        narrow = columns is kept
        self.kept = keep(self.kept, kept, changed)
        self.columns = self.kept if narrow else keep(self.columns, columns, changed)
        self.version, self.changed, self.current = version, changed, True
        self.inputs_due = self.output_due = self.uncompensated = True

    def compensate(self, made: Compensation) -> Compensation:
        """Keep what stands in for the dropped units; compact weights will take it in."""
        old = self.compensation
        if self.changed is not None and self.output is None and old is not None:
            made = made.where(self.changed, old)
        self.uncompensated = False
        self.compensation = made.kept_in(old) if self.holds and not self.compacts else made
        return self.compensation

    def hold_inputs(self, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> CompactLinear:
        """Keep the stacked rows of the input projections [sum of sizes, H] as decode steps read them."""
        old = self.inputs[0][0] if self.inputs else None
        linear = store(weight, bias, old)  # the rows follow `kept`, whichever counts
        self.inputs, self.inputs_due = [(linear, sizes)], False
        return linear

    def hold_output(self, weight: Tensor, bias: Tensor | None) -> CompactLinear:
        """Keep the kept columns of the output projection [H, k], compensation included."""
        exports = self.exports  # the graph's runtime has a layout of its own
        self.output = CompactLinear(weight, bias) if exports else store(weight, bias, self.output, self.changed)
        self.output_due, self.compensation, self.changed = False, None, None
        return self.output


class Selections:
    """All selections of one generation.

    Attributes:
        owner: identity of the transform that made them.
        layers: layer index -> group name -> selection.
        windows: layer index -> group name -> [B, reprobe_every, H], the residual of the last decoded tokens; only
            where the configuration re-probes.
        given: the cache came from the caller, so that decoding may follow: prompts keep compact weights. A cache that
            a plain forward makes for itself holds indices alone until a decode step wants more.
        batch, age: samples of the last call, and tokens decoded since the last probe; counted only where the
            configuration re-probes.
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
    return getattr(cache, _ATTRIBUTE, None)


def put_selections(cache: Any, owner: int) -> Selections:
    """What this KV cache holds, made empty where it held nothing of `owner`."""
    found = selections_on(cache)
    if found is None or found.owner != owner:
        found = Selections(owner)
        setattr(cache, _ATTRIBUTE, found)
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
            selection.current = False


def reserve(model: nn.Module, cache: Cache, batch: int) -> Cache:
    """Give a KV cache the memory of its selections before its first call.

    What a generation keeps (indices, compact weights, windows of re-probes) is otherwise made by the first prompt. That
    is too late for a prompt that is compiled with CUDA graphs (`torch.compile(model, mode="reduce-overhead")`), whose
    outputs its next run overwrites. transformers asks the same of keys and values: `cache.early_initialization(..)`.
    One short prompt runs uncompiled on a cache of its own; the history does not change.

    Args:
        model: a transformed model (or a wrapper of one).
        cache: an empty cache for it, for example `StaticCache(config=model.config, max_cache_len=1024)`.
        batch: sequences of the calls that will use it (beams counted).

    Returns:
        The same cache.

    Raises:
        StateError: the model is not transformed, the cache holds tokens, or it lies on another device.
        InputError: `cache` is no transformers Cache, or `batch` no positive integer.
    """
    from .guard import guard_lifted  # these stand on this module
    from .history import history_frozen
    from .transform import config_of, layers_of

    config, layers = config_of(model), layers_of(model)
    check_integers(1, batch=batch)
    if not isinstance(cache, Cache):
        raise InputError(f"cache={type(cache).__name__} is no KV cache; give a transformers Cache, such as StaticCache")
    if int(cache.get_seq_length()):
        raise StateError("cache holds tokens already; reserve before its first call, or after cache.reset()")
    inner: Any = next(m for m in model.modules() if hasattr(m, "get_input_embeddings") and hasattr(m, "config"))
    weight = inner.get_input_embeddings().weight
    check_device(cache, weight.device)
    ids = torch.arange(batch * config.min_select_tokens, device=weight.device) % weight.shape[0]
    scratch = DynamicCache()
    modes = torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager")
    with contextlib.ExitStack() as stack:
        for mode in (*modes, history_frozen(inner), guard_lifted(layers)):
            stack.enter_context(mode)  # type: ignore[arg-type]
        inner(input_ids=ids.view(batch, -1), past_key_values=scratch, use_cache=True)
    found = selections_on(scratch)
    if found is not None:
        forget(scratch)
        found.reserved = batch
    setattr(cache, _ATTRIBUTE, found)
    return cache


def check_device(cache: Cache, device: torch.device) -> None:
    """Refuse a cache whose keys lie elsewhere.

    Raises:
        StateError: they do.
    """
    keys = next((k for layer in cache.layers if isinstance(k := getattr(layer, "keys", None), Tensor)), None)
    if keys is not None and keys.device != device:
        raise StateError(f"cache lies on {keys.device}, the model on {device}; make a new cache on the model's device")


def compact_bytes(cache: Any) -> int:
    """Bytes of the compact weights that a KV cache holds (those shared with a deep copy are counted in both)."""
    found = selections_on(cache)
    if found is None:
        return 0
    pairs = [pair for s in found.all() for pair in (*(linear for linear, _ in s.inputs or ()), s.output)]
    tensors = [t for pair in pairs if pair is not None for t in pair if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
