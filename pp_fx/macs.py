"""Multiply-accumulates, dense and pruned."""

from .measure.macs import Macs, count_macs

__all__ = ["Macs", "count_macs"]
