"""`placement`: which nodes of an exported file onnxruntime runs where."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import onnxruntime
import torch

from .ort_model import OrtModel


def placement(directory: str | Path, provider: str, *, length: int = 64) -> dict[str, dict[str, Counter[str]]]:
    """Count the nodes that ran, by phase, execution provider and operator: onnxruntime's own profile of both phases.

    A node that the wanted provider has no kernel for runs on the CPU, and copies to and fro lie around it.

    Args:
        directory: what `pp_fx.export.onnx` has written.
        provider: as in `OrtModel.from_pretrained`, for example "CUDAExecutionProvider".
        length: tokens of the prompt.

    Returns:
        "prefill" and "decode" -> provider -> operator type -> nodes.

    Raises:
        InputError: this onnxruntime has no such provider.
        ExportError: the folder is damaged, or onnxruntime cannot load it.
    """
    prompts, steps = (_profiled(directory, provider) for _ in range(2))
    vocabulary = prompts.config.get_text_config().vocab_size
    ids = torch.arange(length)[None] % vocabulary
    cache = prompts(ids, selects=True).past_key_values
    steps(ids[:, :1], past_key_values=cache, selects=False)
    return {"prefill": _counted(prompts), "decode": _counted(steps)}


def _profiled(directory: str | Path, provider: str) -> OrtModel:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "run")
    return OrtModel.from_pretrained(directory, provider=provider, session_options=options)


def _counted(model: OrtModel) -> dict[str, Counter[str]]:
    """Nodes that ran, by provider and operator; the profile is deleted."""
    file = Path(model.session.end_profiling())
    events = json.loads(file.read_text(encoding="utf-8"))
    shutil.rmtree(file.parent)
    found: dict[str, Counter[str]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            given = event["args"]
            found.setdefault(given["provider"], Counter())[given["op_name"]] += 1
    return found
