"""Time of a pruned model against the dense one."""

from .measure.bench import bench

__all__ = ["bench"]
