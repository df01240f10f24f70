"""From how many prompt tokens on a pruned step of vLLM's plug-in pays: one MLP, one thread, interleaved.

    .venv-vllm/bin/python benchmarks/serving_layer.py

Dense: vLLM's own products, with the weights packed by oneDNN, in bf16 or as int8 with activations rounded by token
(W8A8). Pruned: probe, history, score, gather, compensation.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import vllm
from report import write_json
from torch import Tensor
from vllm import _custom_ops

import pp_fx
from pp_fx.integrations.packing import Numbers
from pp_fx.integrations.to_torchao import as_torchao
from pp_fx.integrations.vllm.mlp import PrunedMlp
from pp_fx.integrations.vllm.steps import Steps
from pp_fx.runtime.engine_step import ALL_DENSE, EngineStep

SHAPES = {"SmolLM2-135M": (576, 1536), "Qwen2.5-0.5B": (896, 4864)}
WEIGHTS = ("bf16", "int8")
RATIOS, TOKENS, ROUNDS = (0.3, 0.6), (32, 64, 96, 128, 256, 512, 1024), 21


class Given(Steps):
    """Plans what it is told."""

    step = ALL_DENSE

    def present(self, x: Tensor) -> EngineStep:
        return self.step


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def product(weight: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """A weight [out, in] as the plug-in keeps it, and vLLM's own product with it."""
    if weight.dtype != torch.int8:
        packed = _custom_ops.create_onednn_mm(weight.t(), 32)
        return weight, lambda x, bias=None: _custom_ops.onednn_mm(packed, x, bias)
    scales = torch.rand(weight.shape[0], 1) / 1024
    handler = _custom_ops.create_onednn_scaled_mm(weight.t(), scales, torch.bfloat16, True, False, 32)

    def run(x: Tensor, bias: Tensor | None = None) -> Tensor:
        codes, of_x, zero = _custom_ops.onednn_scaled_int8_quant(x, None, None, True)
        out = x.new_empty(x.shape[0], weight.shape[0])
        _custom_ops.onednn_scaled_mm(handler, codes, out, of_x, zero, None, bias)
        return out

    return as_torchao(Numbers(weight, scales, None, 8, True), torch.bfloat16), run


def make(hidden: int, channels: int, ratio: float, weights: str) -> tuple[PrunedMlp, Given]:
    """A loaded MLP with random weights."""
    drawn = [torch.randn(2 * channels, hidden) * 0.05, torch.randn(hidden, channels) * 0.05]
    cast = [(w * 400).round().clamp(-127, 127).to(torch.int8) if weights == "int8" else w.bfloat16() for w in drawn]
    (inputs, dense_inputs), (output, dense_output) = map(product, cast)
    settings = pp_fx.ProbePruningConfig().on("cpu")
    steps = Given(settings)
    mlp = PrunedMlp("layer", 1, ratio, 0.0, settings, steps, silu_and_mul, False, lambda: None)
    mlp.take_inputs([channels, channels])
    mlp.take_output(channels, [hidden])
    mlp.keep_inputs(inputs, None)
    mlp.keep_output(output)
    mlp.dense_inputs, mlp.dense_output = dense_inputs, dense_output
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
    for weights, (model, shape), ratio in itertools.product(WEIGHTS, SHAPES.items(), RATIOS):
        mlp, steps = make(*shape, ratio, weights)
        for tokens in TOKENS:
            ms = milliseconds(mlp, steps, torch.randn(tokens, shape[0], dtype=torch.bfloat16))
            rows.append({"model": model, "weights": weights, "mlp_ratio": ratio, "tokens": tokens, "ms": ms,
                         "ratio": ms["pruned"] / ms["dense"]})  # fmt: skip
            print(rows[-1], flush=True)
    write_json(options.out, {"rows": rows, "versions": {"vllm": vllm.__version__}})


if __name__ == "__main__":
    main()
