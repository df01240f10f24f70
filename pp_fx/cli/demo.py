"""`pp-fx demo`."""

from __future__ import annotations

import torch

from ..config import ProbePruningConfig
from ..measure.run_eval import run_eval
from ..models import EMBEDDED, load
from ..text import PYTHON_DOCS, read, sequences
from .app import app
from .evaluate import show_evaluation
from .options import Json, console_for


@app.command()
def demo(json_file: Json = None) -> None:
    """Prune the embedded SmolLM2-135M per batch and show perplexity and time beside dense."""
    console = console_for(json_file)
    console.print(
        "Model: SmolLM2-135M-Instruct. Text: Python's own documentation, the first half for calibration, the second "
        "for evaluation."
    )
    model, tokenizer = load(EMBEDDED, torch.bfloat16)
    ids = sequences(read(PYTHON_DOCS), tokenizer, 40, 512)
    result = run_eval(model, ids[20:], 20, ProbePruningConfig(), ids[:20], progress=json_file != "-")
    show_evaluation({"model": EMBEDDED, **result}, json_file, console)
