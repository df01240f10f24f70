"""`report`: one HTML page that shows what pruning does to a model: quality against time, what is kept, the cost."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..calibration.calibrate import calibrate
from ..config import ProbePruningConfig
from ..errors import InputError, StateError
from ..progress import track
from ..rewrite.layer import is_transformed, layers_of
from ..rewrite.transform import restore, transform
from ..runtime.modes import history_frozen, selections_kept
from ..runtime.selections import selections_on
from ..shards import check_whole
from .compare import compare
from .explain import explain
from .report_page import page
from .time_shares import time_shares


def report(
    model: nn.Module,
    ids: Tensor,
    calibration: Tensor,
    directory: str | Path,
    *,
    methods: tuple[str, ...] = ("default", "paper", "wanda_sp", "flap"),
    ratios: tuple[float, ...] = (0.2, 0.4),
    batch: int = 4,
    time_batch: int = 4,
    repeats: int = 3,
    title: str | None = None,
    progress: bool = True,
) -> Path:
    """Measure a model and write `report.html` (self-contained), its pictures as PNG, and `report.json`.

    Args:
        model: an untransformed causal language model in eval mode. It is transformed while this runs and restored.
        ids: int64 [N, T], the evaluation text; N at least twice `batch`, so that selections can be compared.
        calibration: int64 [M, T], other text.
        directory: made if need be; files of an earlier report are replaced.
        methods: names of `pp_fx.methods.METHODS`, rows of the comparison.
        ratios: shares of MLP channels dropped.
        batch: sequences per forward pass; one selection is made per batch.
        time_batch: sequences of the timed forward passes (at most N).
        repeats: timed forward passes of each side.
        title: of the page; the model's class by default.
        progress: show progress bars on stderr.

    Returns:
        Path of report.html.

    Raises:
        InputError: matplotlib is missing, the text is too short, the folder cannot be made, or an argument of
            `compare` cannot be used.
        StateError: the model is transformed.
    """
    try:
        from .report_figures import figures
    except ImportError:
        raise InputError("report needs matplotlib; run: pip install 'pp-fx[report]'") from None
    check_whole(model, "report")
    if is_transformed(model):
        raise StateError("model is transformed; call pp_fx.restore(model) first, report tries several configurations")
    if len(ids) < 2 * batch:
        raise InputError(f"ids holds {len(ids)} sequences, batch={batch}; give at least {2 * batch} or a smaller batch")
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"directory={str(directory)!r} cannot be made ({error}); give a folder") from None
    found: dict[str, Any] = {"title": title or type(model).__name__, "batch": batch, "length": ids.shape[1]}
    found["comparison"] = compare(
        model, ids, calibration, methods=methods, ratios=ratios, batch=batch,
        time_batch=min(time_batch, len(ids)), repeats=repeats, progress=progress,
    )  # fmt: skip
    config = ProbePruningConfig(max(ratios))
    found |= _inside(model, ids, calibration, config, batch, progress)
    pictures = figures(found)
    files = {f"{name}.png": data for name, data in pictures.items()}
    files["report.json"] = json.dumps(found, indent=2).encode()
    files["report.html"] = page(found, pictures).encode()  # last: it appears when all is there
    for name, data in files.items():
        _write(directory / name, data)
    return directory / "report.html"


def _inside(
    model: Any, ids: Tensor, calibration: Tensor, config: ProbePruningConfig, batch: int, progress: bool
) -> dict[str, Any]:
    """What the default selects in every batch, and where its MACs and time go."""
    transform(model, config)
    try:
        calibrate(model, calibration, progress=False)
        with history_frozen(model):
            kept = [_kept(model, part) for part in track(ids.split(batch), "selections", progress)]
            shares = time_shares(model, ids[:batch])
        layers = [asdict(layer) for layer in explain(model, batch=batch, length=ids.shape[1]).layers]
        units = [{k: s.units for k, s in layer.states().items() if s.prunes} for layer in layers_of(model)]
    finally:
        restore(model)
    return {"config": config.to_dict(), "kept": kept, "units": units, "shares": shares, "layers": layers}


def _kept(model: Any, ids: Tensor) -> dict[str, list[int]]:
    """`3.mlp` -> the kept units of a batch."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), selections_kept(layers_of(model)):
        model.base_model(input_ids=ids.to(model.device), past_key_values=cache)
    chosen: Any = selections_on(cache)
    groups = chosen.layers.items() if chosen is not None else ()
    return {f"{index}.{kind}": s.kept.tolist() for index, kinds in groups for kind, s in kinds.items()}


def _write(path: Path, data: bytes) -> None:
    """The file appears whole."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(data)
    partial = Path(file.name)
    partial.chmod(0o644)
    partial.replace(path)
