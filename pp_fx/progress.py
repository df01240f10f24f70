"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def track(items: Any, label: str, shown: bool = True) -> Iterable[Any]:
    """The items, with a bar that disappears when they are done."""
    if not shown:
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    total = len(items) if hasattr(items, "__len__") else None
    return rich_track(items, label, total=total, console=Console(stderr=True), transient=True)
