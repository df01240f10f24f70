"""From how many tokens on pruning an MLP pays on this CPU, by shape and ratio, beside what the cost model says.

    python benchmarks/break_even.py --out benchmarks/results/break-even

Layers of random weights, one sample, one thread, CPU time; dense and pruned calls alternate. Enough layers run in turn
that their weights do not stay in the processor's caches. The constants of `pp_fx/rewrite/cost_model.py` are fitted to
such rows (docs/research/speed.md, section 9). Rows are added to a file that is there.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import write_json
from transformers import AutoModelForCausalLM, LlamaConfig

import pp_fx
from pp_fx.rewrite.cost_model import tokens_that_pay

SHAPES = {
    "SmolLM2-135M": (576, 1536, 9, 3),
    "Qwen2.5-0.5B": (896, 4864, 14, 2),
    "Llama-3.2-1B": (2048, 8192, 32, 8),
    "Llama-2-7B": (4096, 11008, 32, 32),
    "Llama-3-8B": (4096, 14336, 32, 8),
}
"""Hidden size, channels, query heads, key and value heads."""
TOKENS, RATIOS = (32, 64, 128, 256, 512), (0.1, 0.3, 0.6)
_BYTES = 2**27
"""Of weights that run in turn."""


def make(name: str, dtype: torch.dtype) -> Any:
    """So many layers of a shape that their weights fill `_BYTES`, with random weights."""
    hidden, channels, heads, pairs = SHAPES[name]
    layer = 3 * hidden * channels + 2 * hidden * hidden * (heads + pairs) // heads
    count = max(1, -(-_BYTES // (layer * dtype.itemsize)))
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=channels, num_attention_heads=heads, num_key_value_heads=pairs,
        num_hidden_layers=count, vocab_size=1000, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def pruned(model: Any, ratio: float, heads: float) -> Any:
    """A pruned copy that shares the weights, calibrated and frozen."""
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    settings = {"mlp_ratio": ratio, "attention_ratio": heads, "skip_layers": 0, "guard": False}
    pp_fx.transform(made, settings)
    for layer in made.model.layers:
        layer.pp_layer.version = 0  # so that all layers share one compiled graph
    return pp_fx.calibrate(made, torch.randint(5, 1000, (2, 64)), progress=False)


def predicted(model: Any) -> float:
    """Tokens from which on the cost model prunes the layers of a pruned model."""
    layer = model.model.layers[0]
    kept = {kind: state.kept_units for kind, state in layer.states().items()}
    return tokens_that_pay(layer, layer.groups, kept, dataclasses.replace(layer.pp_layer.settings, guard=None), "cpu")


@torch.no_grad()
def measure(
    name: str, dtype: str, compiled: bool, tokens: int, heads: float, ratios: Any, repeats: int
) -> list[dict[str, Any]]:
    """All ratios of a shape at one size, each against the same dense calls."""
    torch.set_num_threads(1)
    model = make(name, getattr(torch, dtype))
    sides = {0.0: model, **{ratio: pruned(model, ratio, heads) for ratio in ratios}}
    ids, times = torch.randint(5, 1000, (1, tokens)), {ratio: [] for ratio in sides}
    if compiled:
        for side in sides.values():
            for layer in side.model.layers:
                layer.compile(fullgraph=True)
    with torch.no_grad():
        for index in range(2 + repeats):
            for ratio, side in sides.items():
                with pp_fx.history_frozen(side):
                    start = time.thread_time()
                    side.model(ids, use_cache=False)
                    took = time.thread_time() - start
                if index >= 2:
                    times[ratio].append(1000 * took / len(model.model.layers))
    ms = {ratio: statistics.median(found) for ratio, found in times.items()}
    row = {"model": name, "dtype": dtype, "compiled": compiled, "attention_ratio": heads, "tokens": tokens}
    return [
        {**row, "mlp_ratio": ratio, "dense_ms": ms[0.0], "pruned_ms": ms[ratio], "ratio": ms[ratio] / ms[0.0],
         "predicted": predicted(sides[ratio])}
        for ratio in ratios
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(SHAPES), help="names, separated by commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--ratios", default=",".join(map(str, RATIOS)))
    parser.add_argument("--heads", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/break-even"))
    parser.add_argument("--one", action="store_true", help="for the processes inside")
    options = parser.parse_args()
    ratios = [float(r) for r in options.ratios.split(",")]
    if options.one:
        rows = measure(
            options.models,
            options.dtype,
            not options.eager,
            int(options.tokens),
            options.heads,
            ratios,
            options.repeats,
        )
        options.out.write_text(json.dumps(rows), encoding="utf-8")
        return
    file = options.out.with_suffix(".json")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for name in options.models.split(","):
        for tokens in options.tokens.split(","):
            with tempfile.NamedTemporaryFile(suffix=".json") as inner:
                command = [
                    sys.executable,
                    __file__,
                    "--one",
                    "--models",
                    name,
                    "--tokens",
                    tokens,
                    "--ratios",
                    options.ratios,
                ]
                command += ["--heads", str(options.heads), "--dtype", options.dtype, "--repeats", str(options.repeats)]
                command += ["--eager"] * options.eager
                subprocess.run([*command, "--out", inner.name], check=True)
                rows += json.loads(Path(inner.name).read_text(encoding="utf-8"))
            write_json(file, {"rows": rows})
            print(name, tokens, {r["mlp_ratio"]: round(r["ratio"], 3) for r in rows[-len(ratios) :]}, flush=True)


if __name__ == "__main__":
    main()
