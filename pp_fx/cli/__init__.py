"""Command line `pp-fx`: thin over the Python API, one command a file."""

from .app import app, main

from . import demo, evaluate, bench, report, build_ort_ops, export, lm_eval, explain, compare, serve  # isort: skip  # the order of --help

__all__ = [
    "app",
    "bench",
    "build_ort_ops",
    "compare",
    "demo",
    "evaluate",
    "explain",
    "export",
    "lm_eval",
    "main",
    "report",
    "serve",
]
