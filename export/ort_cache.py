"""What a generation of an exported model keeps, in onnxruntime's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from torch import Tensor
from transformers.cache_utils import Cache


class OrtCache(Cache):
    """Keys, values and the selection of one generation, in onnxruntime's memory.

    Attributes:
        past: input name -> OrtValue [B, kv heads, S, D].
        compact: input name -> OrtValue, of the last call that selected.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.past: dict[str, Any] = {}
        self.compact: dict[str, Any] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held."""
        return next(iter(self.past.values())).shape()[2] if self.past else 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no limit."""
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Samples in the order of `beam_idx` [B]; one selection serves all of them, so it stays."""
        order = beam_idx.cpu().numpy()
        self._map(lambda value: value[order])

    def batch_select_indices(self, indices: Tensor) -> None:
        """As `reorder_cache`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sample `repeats` times."""
        self._map(lambda value: value.repeat(repeats, 0))

    def crop(self, max_length: int) -> None:
        """The first `max_length` tokens; a negative number drops so many."""
        length = max_length if max_length >= 0 else self.get_seq_length() + max_length
        if length < self.get_seq_length():
            self._map(lambda value: value[:, :, :length])
        if length == 0:
            self.reset()

    def reset(self) -> None:
        """Empty, without a selection."""
        self.past, self.compact = {}, {}

    def __deepcopy__(self, memo: dict[int, Any]) -> OrtCache:
        """Shares the tensors, which nothing changes in place."""
        copied = OrtCache()
        copied.past, copied.compact = dict(self.past), dict(self.compact)
        return copied

    def _map(self, change: Any) -> None:
        self.past = {name: ort_value(np.ascontiguousarray(change(value.numpy()))) for name, value in self.past.items()}


def ort_value(array: Any) -> Any:
    """A numpy array as onnxruntime holds it."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
