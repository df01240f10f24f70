"""How quantized weights hold their numbers, and how rows and columns are taken of them: one file for a layout."""

from .layout import (
    Codes,
    Layout,
    by_columns,
    codes_of,
    is_plain,
    layout_of,
    map_parts,
    refusal,
    row_range,
    stored_bytes,
    take_columns,
    take_rows,
    unrounded,
    widened,
)
from .scaled_groups import ScaledGroups
from .scaled_rows import ScaledRows

__all__ = [
    "Codes",
    "Layout",
    "ScaledGroups",
    "ScaledRows",
    "by_columns",
    "codes_of",
    "is_plain",
    "layout_of",
    "map_parts",
    "refusal",
    "row_range",
    "stored_bytes",
    "take_columns",
    "take_rows",
    "unrounded",
    "widened",
]
