"""From how many prompt tokens on a pruned step of vLLM's plug-in pays: one MLP, bf16, one thread, interleaved.

    .venv-vllm/bin/python benchmarks/serving_layer.py

Dense: vLLM's own products, with the weights packed by oneDNN. Pruned: probe, history, score, gather, compensation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import vllm
from report import write_json
from torch import Tensor
from vllm import _custom_ops

import pp_fx
from pp_fx.integrations.vllm.mlp import PrunedMlp
from pp_fx.integrations.vllm.steps import Steps
from pp_fx.runtime.engine_step import ALL_DENSE, EngineStep

SHAPES = {"SmolLM2-135M": (576, 1536), "Qwen2.5-0.5B": (896, 4864)}
RATIOS, TOKENS, ROUNDS = (0.3, 0.6), (32, 64, 96, 128, 256, 512, 1024), 21


class Given(Steps):
    """Plans what it is told."""

    step = ALL_DENSE

    def present(self, x: Tensor) -> EngineStep:
        return self.step


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def make(hidden: int, channels: int, ratio: float) -> tuple[PrunedMlp, Given]:
    """A loaded MLP with random weights."""
    inputs = torch.randn(2 * channels, hidden, dtype=torch.bfloat16) * 0.05
    output = torch.randn(hidden, channels, dtype=torch.bfloat16) * 0.05
    settings = pp_fx.ProbePruningConfig().on("cpu")
    steps = Given(settings)
    mlp = PrunedMlp("layer", 1, ratio, 0.0, settings, steps, silu_and_mul, False, lambda: None)
    mlp.take_inputs([channels, channels])
    mlp.take_output(channels, [hidden])
    mlp.keep_inputs(inputs, None)
    mlp.keep_output(output)
    packed = [_custom_ops.create_onednn_mm(weight.t(), 32) for weight in (inputs, output)]
    mlp.dense_inputs = lambda x, bias: _custom_ops.onednn_mm(packed[0], x, bias)
    mlp.dense_output = lambda z: _custom_ops.onednn_mm(packed[1], z, None)
    return mlp, steps


def milliseconds(mlp: PrunedMlp, steps: Given, x: Tensor) -> dict[str, float]:
    """Medians of interleaved calls."""
    found: dict[str, list[float]] = {"dense": [], "pruned": []}
    for _ in range(ROUNDS):
        for side, steps.step in (("dense", ALL_DENSE), ("pruned", EngineStep(prunes=True))):
            start = time.perf_counter()
            mlp.result(silu_and_mul(mlp.run(x, None)), None)
            found[side].append((time.perf_counter() - start) * 1000)
    return {side: statistics.median(times) for side, times in found.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving-layer.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model, shape in SHAPES.items():
        for ratio in RATIOS:
            mlp, steps = make(*shape, ratio)
            for tokens in TOKENS:
                ms = milliseconds(mlp, steps, torch.randn(tokens, shape[0], dtype=torch.bfloat16))
                rows.append({"model": model, "mlp_ratio": ratio, "tokens": tokens, "ms": ms,
                             "ratio": ms["pruned"] / ms["dense"]})  # fmt: skip
                print(rows[-1], flush=True)
    write_json(options.out, {"rows": rows, "versions": {"vllm": vllm.__version__}})


if __name__ == "__main__":
    main()
