"""The files around the graph: configurations, tokenizer, checksums, a README card."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import ExportError, InputError
from .names import INPUT_IDS, LOGITS, MASK, PAST, POSITIONS, PRESENT, key_value

MODEL, STATEFUL, DATA, SETTINGS = "model.onnx", "model_stateful.onnx", "model.onnx_data", "pp_fx.json"
_CHUNK = 2**22
_CARD = """# {name}, pruned by pp_fx

`model.onnx` runs under a stock onnxruntime: a prompt selects the MLP channels and attention heads it needs, and only
these run. Method: Probe Pruning (arXiv 2502.15618).

| | |
|---|---|
| kept block MACs, probe, compensation | {macs} |
| dtype | {dtype} |
| linear weights | {weights} |
| opset | {opset} |
| MLP channels dropped | {mlp} |
| query heads dropped | {attention} |

## Inputs and outputs

- `input_ids`, `attention_mask`, `position_ids`, `past_key_values.N.key|value` -> `logits`, `present.N.key|value`: the
  names that tools expect. A call of at least {tokens} tokens selects; a shorter one, decoding, runs the compact weights
  that it is given, or else the whole weights.
- `present_compact.*` of the prompt's call, fed back as `pp_compact.*`, make decoding run the prompt's selection. Tools
  that do not know them get right, unpruned decoding.
- `present_history.*`, fed back as `pp_history.*`, keep the history learning; without them it stays as exported.
- `num_logits_to_keep` (default 0): logits of so many last tokens alone; 0 means all.
- `pp_min_select_tokens` (default {tokens}): 1 makes a call select whatever its length.

All of these are optional: they are initializers. `pp_fx.export.OrtModel` feeds them for you.

Runtimes that cannot override initializers (onnxruntime-node and onnxruntime-web leave them out without a word) take
`model_stateful.onnx`: the same graph and weights, but `pp_compact.*` and `num_logits_to_keep` have to be given. Empty
compact weights (0 rows; `kept` with 0 entries) make a call select; then feed back what it returns.
"""


def check_target(directory: Path, overwrite: bool) -> None:
    """Raises:

    InputError: `directory` is a file, or holds files and `overwrite` is not set, or files of others.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"directory={str(directory)!r} is a file; give a folder")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise InputError(f"directory={str(directory)!r} is not empty; give another one or overwrite=True")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / SETTINGS).is_file():
        raise InputError(f"directory={str(directory)!r} was not written by pp_fx.export.onnx; give another one")


def prepare(directory: str | Path, overwrite: bool) -> Path:
    """A folder next to `directory` to write into; `finish` puts it in place.

    Raises:
        InputError: as `check_target`.
    """
    directory = Path(directory).resolve()
    check_target(directory, overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    partial.chmod(0o755)  # mkdtemp's is for the owner alone
    return partial


def finish(partial: Path, directory: str | Path) -> None:
    """Move the finished folder into place; what was there goes only then."""
    directory = Path(directory).resolve()
    former = partial.with_name(f"{partial.name}.former")
    if directory.is_dir():
        directory.rename(former)
    partial.rename(directory)
    shutil.rmtree(former, ignore_errors=True)


def write_configs(directory: Path, model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
    """config.json, generation_config.json, tokenizer files, genai_config.json, the card, and checksums of all."""
    model.config.save_pretrained(directory)
    generation = model.generation_config
    generation.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    genai = _genai(model.config.get_text_config(), generation)
    (directory / "genai_config.json").write_text(json.dumps(genai, indent=2))
    (directory / "README.md").write_text(_CARD.format(**settings["card"]))
    sums = {p.name: _checksum(p) for p in sorted(directory.iterdir())}
    (directory / SETTINGS).write_text(json.dumps({**settings, "sha256": sums}, indent=2))


def read_settings(directory: Path) -> dict[str, Any]:
    """What the exporter noted.

    Raises:
        ExportError: the folder is not one of ours, or its notes cannot be read.
    """
    path = directory / SETTINGS
    if not path.is_file():
        raise ExportError(f"{path} is missing; give a folder that pp_fx.export.onnx has written")
    try:
        found = json.loads(path.read_text())
        if not isinstance(found["min_select_tokens"], int) or not isinstance(found["sha256"], dict):
            raise TypeError("wrong types")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read ({error}); export the model again") from None
    return found


def check_files(directory: Path) -> None:
    """Graph, weights and configuration are those that were written.

    Raises:
        ExportError: a file is missing, was truncated or edited.
    """
    sums = read_settings(directory)["sha256"]
    for name in (MODEL, STATEFUL, DATA, "config.json"):
        path = directory / name
        if not path.is_file():
            raise ExportError(f"{path} is missing; copy the whole folder or export the model again")
        if sums.get(name) != _checksum(path):
            raise ExportError(f"{path} is not the file that was exported (checksum differs); export the model again")


def context_length(config: Any) -> int:
    """Tokens that a model is made for; 2048 where its configuration sets no limit (alibi)."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2048


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _genai(config: Any, generation: Any) -> dict[str, Any]:
    """onnxruntime-genai's configuration: https://onnxruntime.ai/docs/genai/reference/config.html."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    eos = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    pad = generation.pad_token_id if generation.pad_token_id is not None else config.pad_token_id
    first = eos[0] if isinstance(eos, list) else eos
    inputs = {
        "input_ids": INPUT_IDS,
        "attention_mask": MASK,
        "position_ids": POSITIONS,
        "past_key_names": key_value(PAST, "%d", "key"),
        "past_value_names": key_value(PAST, "%d", "value"),
    }
    outputs = {
        "logits": LOGITS,
        "present_key_names": key_value(PRESENT, "%d", "key"),
        "present_value_names": key_value(PRESENT, "%d", "value"),
    }
    length = context_length(config)
    return {
        "model": {
            "type": "llama",
            "bos_token_id": config.bos_token_id if config.bos_token_id is not None else 1,
            "eos_token_id": eos if eos is not None else config.vocab_size - 1,  # genai wants one of the vocabulary
            "pad_token_id": pad if pad is not None else first if first is not None else 0,
            "vocab_size": config.vocab_size,
            "context_length": length,
            "decoder": {
                "session_options": {"log_severity_level": 3, "provider_options": []},
                "filename": MODEL,
                "hidden_size": config.hidden_size,
                "num_attention_heads": heads,
                "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
                "num_hidden_layers": config.num_hidden_layers,
                "head_size": size,
                "inputs": inputs,
                "outputs": outputs,
            },
        },
        "search": {"max_length": length, "past_present_share_buffer": False, "do_sample": False},
    }
