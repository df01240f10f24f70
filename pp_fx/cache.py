"""What a caller may do with the selections on a KV cache: forget them, make room for them, ask for their size."""

from .rewrite.reserve import reserve
from .runtime.selections import compact_bytes, forget, selections_on

__all__ = ["compact_bytes", "forget", "reserve", "selections_on"]
