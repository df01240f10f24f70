"""Every causal and image-text model class of the installed transformers, tiny: right at ratio 0, or refused by name.

python reliability/model_classes.py [--only llama gpt2] [--onnx]
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto
from transformers.utils import logging

import pp_fx
from pp_fx.errors import PpFxError

RESULTS = Path(__file__).parent / "results" / "model_classes.json"
AUTO = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
    "image-text": (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
}
ZERO = {"mlp_ratio": 0.0, "attention_ratio": 0.0, "skip_layers": 0}
LIMIT_S = 180
VOCABULARY = 128
_SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_attention_groups"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "global_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "d_ff"), 96),
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rotary_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "num_shared_experts", "n_shared_experts", "pretraining_tp"), 1),
    "image_size": 32,
    "patch_size": 8,
    "sliding_window": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "vision_start_token_id")


class TimeUp(Exception):
    """A class took longer than `LIMIT_S`."""


def small(config: Any) -> Any:
    """The same kind of configuration with small sizes, sub-configurations included."""
    fields: dict[str, Any] = {}
    depth = getattr(config, "num_hidden_layers", None)
    for name, value in config.to_dict().items():
        if name in ("transformers_version", "architectures", "model_type"):
            continue
        sub = getattr(config, name, None)
        if isinstance(sub, transformers.PreTrainedConfig):
            fields[name] = small(sub)
        elif name in _SMALL and isinstance(value, int) and not isinstance(value, bool):
            fields[name] = min(value, _SMALL[name]) if name.startswith("num_") or value < _SMALL[name] else _SMALL[name]
        elif name.endswith("_token_id") and isinstance(value, int):
            fields[name] = min(value, VOCABULARY - 1)
        elif name in _TOKENS and isinstance(value, int):
            fields[name] = VOCABULARY - 1
        elif isinstance(value, list) and len(value) == depth:  # of every layer: one of each kind
            kinds = value if any(isinstance(v, list | dict) for v in value) else [*dict.fromkeys(value), *value]
            fields[name] = kinds[: _SMALL["num_hidden_layers"]]
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
            fields[name] = {**value, "mrope_section": [2, 3, 3]}
        else:
            fields[name] = value
    if fields.get("kv_lora_rank") and "num_key_value_heads" in fields:  # MLA has no groups
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return type(config)(**fields)


def build(config: Any, auto: Any) -> Any:
    """A random model in eval mode, with weights large enough that errors show."""
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def judge(kind: str, name: str, export: bool) -> dict[str, str]:
    """What becomes of one class: `result` right, refused, STRAY, or what the original itself cannot do."""
    auto = AUTO[kind][1]
    try:
        config = small(CONFIG_MAPPING[name]())
        model = build(config, auto)
    except Exception as error:
        return {"result": "not built", "reason": _one_line(error)}
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    try:
        dense = logits(model, ids)
        assert dense.isfinite().all(), "logits are not finite"
        repeats = torch.equal(logits(model, ids), dense)
    except Exception as error:
        return {"result": "original fails", "reason": _one_line(error)}
    found = {"class": type(model).__name__}
    try:
        told = _ends(lambda: pp_fx.explain(copy.deepcopy(config), ZERO))
        done = _ends(lambda: pp_fx.transform(model, ZERO))
        if done is not None and (pp_fx.is_transformed(model) or not torch.equal(logits(model, ids), dense)):
            return {**found, "result": "STRAY", "reason": f"a refused model is changed ({done})"}
        if (told is None) != (done is None):
            return {**found, "result": "STRAY", "reason": f"explain says {told}, transform {done}"}
        if done is not None:
            return {**found, "result": "refused", "reason": done}
        error = (logits(model, ids) - dense).abs().max() / dense.abs().max()
        if error > (0 if repeats else 1e-3):
            return {**found, "result": "STRAY", "reason": f"other logits at ratio 0, by {error:.1e}"}
        pp_fx.restore(model)
        if not torch.equal(logits(model, ids), dense) and repeats:
            return {**found, "result": "STRAY", "reason": "other logits after restore"}
        found["result"] = "right"
        if export:
            found["onnx"] = _export(model)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {
            **found,
            "result": "STRAY",
            "reason": f"{_one_line(error)} at {Path(where.filename).name}:{where.lineno}",
        }
    return found


def _export(model: Any) -> str:
    """The whole way at a real ratio: ONNX, compared with torch by the export itself."""
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            pp_fx.transform(model, {"mlp_ratio": 0.3, "skip_layers": 0, "round_to": 1})
            pp_fx.export.onnx(model, Path(folder, "out"))

        return _ends(run) or "right"


def _ends(action: Any) -> str | None:
    """None, or the pp_fx error that it ends in."""
    try:
        action()
    except PpFxError as error:
        return f"{type(error).__name__}: {_one_line(error)}"
    return None


def _one_line(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if not isinstance(error, PpFxError)
        else str(error)[:300]
    )


def _too_long(*given: Any) -> None:
    raise TimeUp(f"took longer than {LIMIT_S} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="model types")
    parser.add_argument("--onnx", action="store_true", help="export each as well (half a minute each)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    jobs = [
        (kind, name) for kind, (names, _) in AUTO.items() for name in names if not options.only or name in options.only
    ]
    found: dict[str, Any] = {}
    signal.signal(signal.SIGALRM, _too_long)
    for kind, name in track(jobs, "model classes", console=Console(stderr=True)):
        signal.alarm(LIMIT_S)
        try:
            found[f"{kind}: {name}"] = judge(kind, name, options.onnx)
        except TimeUp as error:
            found[f"{kind}: {name}"] = {"result": "STRAY", "reason": str(error)}
        finally:
            signal.alarm(0)
        if found[f"{kind}: {name}"]["result"] == "STRAY":
            print(kind, name, found[f"{kind}: {name}"], flush=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    options.out.write_text(json.dumps({"versions": versions, "classes": found}, indent=1) + "\n", encoding="utf-8")
    counts: dict[str, int] = {}
    for row in found.values():
        counts[row["result"]] = counts.get(row["result"], 0) + 1
    print(counts)


if __name__ == "__main__":
    main()
