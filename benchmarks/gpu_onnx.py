"""The exported file under onnxruntime's CUDA provider, in 3 minutes: right, what runs on the CPU, and how fast.

    pip install '.[onnxruntime-gpu]' && python benchmarks/gpu_onnx.py

A random Llama in fp16 is exported, compared with torch (`pp_fx.export.check`), its nodes counted by provider (wanted:
none of a layer on the CPU), then prompts and decode steps are timed: pruned, and the same file with every unit. Without
the provider it says so and stops; `--provider CPUExecutionProvider --tiny` tries the script.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from report import write_json
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import pp_fx

SHAPES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
          "num_hidden_layers": 8, "vocab_size": 32000, "max_position_embeddings": 2048}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 3, "vocab_size": 97, "max_position_embeddings": 256}  # fmt: skip


def exported(folder: Path, tiny: bool) -> None:
    """A calibrated model's file; fp16, or fp32 for `tiny`."""
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if tiny else SHAPES))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if tiny else torch.float16).eval()
    pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=16 if tiny else 64))
    pp_fx.calibrate(model, torch.randint(0, config.vocab_size, (4, 64)), progress=False)
    pp_fx.export.onnx(model, folder)


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds, after two calls that do not count; logits come back to the host, so each call is whole."""
    times = []
    for index in range(2 + repeats):
        start = time.perf_counter()
        call()
        if index >= 2:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--provider", default="CUDAExecutionProvider")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu-onnx"))
    options = parser.parse_args()
    console = Console()
    if options.provider not in onnxruntime.get_available_providers():
        console.print(f"skipped: this onnxruntime has no {options.provider} (pip install 'pp-fx[onnxruntime-gpu]')")
        sys.exit(0)
    with tempfile.TemporaryDirectory() as folder:
        exported(Path(folder) / "out", options.tiny)
        directory = Path(folder) / "out"
        found = pp_fx.export.check(directory, provider=options.provider)
        places = pp_fx.export.placement(directory, options.provider)
        model = pp_fx.export.OrtModel.from_pretrained(directory, provider=options.provider)
        batch, length = (2, 64) if options.tiny else (4, 512)
        ids = torch.randint(0, model.config.vocab_size, (batch, length))
        rows = []
        for name, selects in (("pruned", True), ("every unit", False)):
            prompt = median_ms(lambda s=selects: model(ids, selects=s, logits_to_keep=1), options.repeats)
            cache = model(ids[:1], selects=selects, logits_to_keep=1).past_key_values
            step = median_ms(lambda c=cache: model(ids[:1, :1], past_key_values=c, selects=False), options.repeats)
            rows.append({"side": name, "prefill_ms": prompt, "decode_ms": step})
    table = Table("", f"prefill {batch} x {length} ms", "decode ms")
    for row in rows:
        table.add_row(row["side"], f"{row['prefill_ms']:.2f}", f"{row['decode_ms']:.2f}")
    console.print(table)
    for phase, providers in places.items():
        for provider, operators in providers.items():
            if provider != options.provider:
                console.print(f"{phase}: on {provider}: {dict(operators)}")
    console.print(f"check: {'passed' if found.passed else 'FAILED'}, {found.to_dict()}")
    document = {"provider": options.provider, "check": found.to_dict(), "placement": places, "rows": rows}
    write_json(options.out.with_suffix(".json"), document)


if __name__ == "__main__":
    main()
