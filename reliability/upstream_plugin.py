"""pytest plugin: every causal model that transformers' own tests build is transformed (`reliability/upstream.py`).

Environment: PP_FX_MODE is "off", "zero" or "pruned"; PP_FX_REPORT the JSON file with one record for each test.
A model is transformed at the end of its outermost `__init__`, or of `from_pretrained`; the test sees nothing of it.
"""

from __future__ import annotations

import functools
import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import PreTrainedModel

import pp_fx
from pp_fx.errors import PpFxError

MODES: dict[str, dict[str, Any]] = {
    "zero": {"mlp_ratio": 0.0, "attention_ratio": 0.0, "skip_layers": 0},
    "pruned": {"mlp_ratio": 0.4, "attention_ratio": 0.5, "skip_layers": 0, "round_to": 1, "freeze_history": True},
}
SETTINGS = MODES.get(os.environ.get("PP_FX_MODE", "off"))
_records: dict[str, dict[str, Any]] = {}
_now: dict[str, Any] = {}
_building: list[Any] = []  # the models whose __init__ runs, the outermost first; a mark while weights are loaded


def _transform(model: Any) -> None:
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if not causal or any(p.is_meta for p in model.parameters()) or pp_fx.is_transformed(model):
        return
    training, state = model.training, torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pp_fx.transform(model.eval(), SETTINGS)
        _now["transforms"] = _now.get("transforms", 0) + 1
    finally:
        model.train(training)
        torch.set_rng_state(state)


def _wrap_init(cls: type) -> None:
    own = cls.__dict__.get("__init__")
    if own is None or hasattr(own, "pp_fx"):
        return

    @functools.wraps(own)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        outermost = not _building
        _building.append(self)
        try:
            own(self, *args, **kwargs)
        finally:
            _building.pop()
        if outermost:
            _transform(self)

    __init__.pp_fx = True  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[misc]


def _wrap_all() -> None:
    def subclasses(cls: type) -> Any:
        for sub in cls.__subclasses__():
            yield sub
            yield from subclasses(sub)

    for cls in list(subclasses(PreTrainedModel)):
        _wrap_init(cls)
    inherited, load = PreTrainedModel.__init_subclass__.__func__, PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def __init_subclass__(cls: type, **kwargs: Any) -> None:
        inherited(cls, **kwargs)
        _wrap_init(cls)

    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        _building.append(None)  # its weights come later
        try:
            result = load(cls, *args, **kwargs)
        finally:
            _building.pop()
        if not _building:
            _transform(result[0] if isinstance(result, tuple) else result)
        return result

    PreTrainedModel.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
    init = PpFxError.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _now.setdefault("refused", []).append(f"{type(self).__name__}: {args[0] if args else ''}"[:300])

    PpFxError.__init__ = noted  # type: ignore[method-assign]


def pytest_configure(config: Any) -> None:
    if SETTINGS is not None:
        _wrap_all()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: Any, nextitem: Any) -> Any:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    torch._dynamo.reset()
    _now.clear()
    yield
    _records.setdefault(item.nodeid, {}).update(_now)
    Path(os.environ["PP_FX_REPORT"]).write_text(json.dumps(_records, indent=1))


def pytest_runtest_logreport(report: Any) -> None:
    """Also of subtests: a test with a failed subtest has failed."""
    record = _records.setdefault(report.nodeid, {})
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        record["outcome"] = "failed"
        record.setdefault("errors", []).append(str(crash.message if crash else report.longrepr)[:600])
    elif not hasattr(report, "context") and (report.when == "call" or report.skipped):
        record.setdefault("outcome", report.outcome)
