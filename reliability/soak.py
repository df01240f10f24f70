"""Serve thousands of requests of random sizes, several open at a time, and watch memory, recompiles and leaks.

    python reliability/soak.py --requests 10000

Through the eager model, the compiled one and onnxruntime. A request is a prompt of 1 to 4 samples and 2 to 48 tokens,
and up to 4 tokens decoded after it; four are open at once and advance in random order. One in fifty is run again
alone: it must give the same, or a selection has leaked from one request to another. Memory is the resident size of
the process; its slope is fitted over the second half of the requests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

import pp_fx

RESULTS = Path(__file__).parent / "results" / "soak.json"
OPEN, CHECKED, SAMPLED = 4, 50, 100
VOCABULARY = 128


@dataclass(eq=False)
class Request:
    """A prompt [B, T], the tokens to decode after it, and the last logits of every call so far."""

    ids: Tensor
    following: list[Tensor]
    cache: Any = None
    logits: list[Tensor] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return len(self.logits) > len(self.following)


class Server:
    """Runs one call of a request; `new_cache` makes what it keeps between them."""

    def __init__(self, forward: Callable[..., Any], new_cache: Callable[[], Any]) -> None:
        self.forward, self.new_cache = forward, new_cache

    def advance(self, request: Request) -> None:
        step = len(request.logits)
        if step == 0:
            request.cache = self.new_cache()
        ids = request.ids if step == 0 else request.following[step - 1]
        out = self.forward(input_ids=ids, past_key_values=request.cache)
        request.cache = out.past_key_values
        request.logits.append(out.logits[:, -1].clone())

    def alone(self, request: Request) -> list[Tensor]:
        again = Request(request.ids, request.following)
        while not again.ended:
            self.advance(again)
        return again.logits


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    settings = pp_fx.ProbePruningConfig(
        mlp_ratio=0.4, attention_ratio=0.4, skip_layers=0, round_to=1, compensation_min_tokens=64
    )
    pp_fx.transform(model, settings)
    return pp_fx.calibrate(model, torch.randint(2, VOCABULARY, (4, 32)), progress=False)


def some_request(source: random.Random) -> Request:
    batch, length = source.randint(1, 4), source.randint(2, 48)
    generator = torch.Generator().manual_seed(source.randrange(2**31))
    tokens = torch.randint(2, VOCABULARY, (batch, length + source.randint(0, 4)), generator=generator)
    return Request(
        tokens[:, :length].contiguous(), [t.contiguous() for t in tokens[:, length:].split(1, 1) if t.numel()]
    )


def resident_mb() -> float:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def slope(memory: list[float]) -> float:
    """MiB per 1000 requests over the second half of the samples, one every `SAMPLED` requests."""
    later = memory[len(memory) // 2 :]
    fitted = statistics.linear_regression([i * SAMPLED / 1000 for i in range(len(later))], later)
    return fitted.slope


def soak(server: Server, name: str, requests: int, tolerance: float) -> dict[str, Any]:
    """Serve, and count what goes wrong."""
    source, waiting, memory, graphs = random.Random(0), [], [], []
    checked, leaked = 0, 0
    for index in track(range(requests), name, console=Console(stderr=True)):
        waiting.append(some_request(source))
        while len(waiting) >= OPEN:
            request = source.choice(waiting)
            server.advance(request)
            if request.ended:
                waiting.remove(request)
                if index % CHECKED == 0:
                    checked += 1
                    pairs = zip(request.logits, server.alone(request), strict=True)
                    leaked += not all(torch.allclose(a, b, atol=tolerance, rtol=0) for a, b in pairs)
        if index % SAMPLED == 0:
            memory.append(resident_mb())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return {
        "requests": requests,
        "checked": checked,
        "leaked": leaked,
        "mb_at_half": memory[len(memory) // 2],
        "mb_at_end": memory[-1],
        "mb_per_1000": slope(memory),
        "graphs_at_half": graphs[len(graphs) // 2],
        "graphs_at_end": graphs[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, found = tiny(), {}
    with torch.no_grad(), pp_fx.history_frozen(model), tempfile.TemporaryDirectory() as folder:
        eager = Server(model, lambda: DynamicCache(config=model.config))
        found["eager"] = soak(eager, "eager", options.requests, 0.0)
        pp_fx.export.onnx(model, Path(folder, "out"))
        ort = pp_fx.export.OrtModel.from_pretrained(Path(folder, "out"), threads=1)
        found["onnxruntime"] = soak(Server(ort, lambda: None), "onnxruntime", options.requests, 0.0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch._dynamo.config.recompile_limit = 32  # one sample or more, short or long prompts, first and later steps
        static = lambda: StaticCache(config=model.config, max_cache_len=64)  # noqa: E731
        compiled = Server(torch.compile(model, dynamic=True, fullgraph=True), static)
        found["compiled"] = soak(compiled, "compiled", options.requests, 1e-5)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    Console().print_json(data=found)


if __name__ == "__main__":
    main()
