"""Time under onnxruntime on the CPU: our pruned file against onnxruntime-genai's dense export and our own dense run.

All are interleaved in one process with the same session options; medians of wall time. Needs Linux, a C++ compiler,
the packages of `pp-fx[onnxruntime]` and onnxruntime-genai (its model builder writes the dense file):

    python benchmarks/onnx_runtime.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from report import STICKY, bars, write_json
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

import pp_fx
import pp_fx.text
from pp_fx.export import OrtModel
from pp_fx.models import load

LAST, BODIES = "pruned, last logits", "pruned, function bodies"


class Genai:
    """The dense file of onnxruntime-genai's model builder, with keys and values kept in onnxruntime's memory."""

    def __init__(self, folder: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        config = AutoConfig.from_pretrained(folder.with_name("hf"))
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.shape = config.num_key_value_heads, 0, size
        self.past: dict[str, Any] = {}

    def __call__(self, ids: torch.Tensor, keeps: bool = False) -> torch.Tensor:
        batch, length = ids.shape
        before = next(iter(self.past.values())).shape()[2] if keeps else 0
        binding = self.session.io_binding()
        given = {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((batch, before + length), np.int64),
            "position_ids": np.arange(before, before + length)[None].repeat(batch, 0),
        }
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        for i in self.session.get_inputs():
            if i.name in given:
                binding.bind_ortvalue_input(i.name, value(given[i.name]))
            elif keeps:
                binding.bind_ortvalue_input(i.name, self.past[i.name.replace("past_key_values", "present")])
            else:
                binding.bind_ortvalue_input(i.name, value(np.zeros((batch, *self.shape), np.float32)))
        names = [o.name for o in self.session.get_outputs()]
        for name in names:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        found = dict(zip(names, binding.get_outputs(), strict=True))
        logits = torch.from_numpy(found.pop("logits").numpy())
        self.past = found
        return logits


class Ours:
    """Our file with the native kernels, or with the operators' bodies; `dense` never selects."""

    def __init__(self, folder: Path, threads: int, *, dense: bool = False, library: str | None = "auto") -> None:
        self.model, self.dense = OrtModel.from_pretrained(folder, threads=threads, ops_library=library), dense
        self.cache: Any = None

    def __call__(self, ids: torch.Tensor, keeps: bool = False, logits: int = 0) -> torch.Tensor:
        before = self.cache if keeps else None
        out = self.model(ids, past_key_values=before, logits_to_keep=logits, selects=False if self.dense else None)
        self.cache = out.past_key_values
        return out.logits


def medians(calls: dict[str, Any], repeats: int, warm_up: int) -> dict[str, float]:
    """Milliseconds of each call, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + warm_up):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[warm_up:]) for name, values in times.items()}


def run(folder: Path, dense: Path, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for threads in (1, 2):
        genai, pruned, own = (
            Genai(dense, threads),
            Ours(folder, threads),
            Ours(folder, threads, dense=True, library=None),
        )
        bodies = Ours(folder, threads, library=None)
        for batch, length in ((2, 512), (4, 512)):
            ids = torch.randint(0, 49000, (batch, length))
            found = medians(
                {
                    "genai dense": partial(genai, ids),
                    "own dense": partial(own, ids),
                    "pruned": partial(pruned, ids),
                    BODIES: partial(bodies, ids),
                    LAST: partial(pruned, ids, logits=1),
                },
                repeats,
                1,
            )
            rows.append({"phase": f"prefill {batch} x {length}", "threads": threads, "ms": found})
        prompt, token = torch.randint(0, 49000, (1, 128)), torch.tensor([[5]])
        for side in (genai, own, pruned, bodies):
            side(prompt)
        calls = {
            "genai dense": partial(genai, token, True),
            "own dense": partial(own, token, True),
            "pruned": partial(pruned, token, True),
            BODIES: partial(bodies, token, True),
        }
        found = medians(calls, 10 * repeats, 5)
        rows.append({"phase": "decode 1 x 128", "threads": threads, "ms": found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/onnx-runtime"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tokenizer = load("smollm2", torch.float32)
        model.save_pretrained(folder / "hf")
        tokenizer.save_pretrained(folder / "hf")
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(folder / "hf")]
        where = ["-o", str(folder / "genai"), "-p", "fp32", "-e", "cpu"]
        subprocess.run([*builder, *where], check=True, capture_output=True)
        config = pp_fx.ProbePruningConfig.from_dict({**STICKY, "mlp_ratio": 0.4})
        pp_fx.transform(model, config)
        text = pp_fx.text.sequences(pp_fx.text.read(pp_fx.text.PYTHON_DOCS), tokenizer, 16, 512)
        pp_fx.calibrate(model, text)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
        start = time.perf_counter()
        pp_fx.export.onnx(model, folder / "pruned", tokenizer=tokenizer)
        seconds = time.perf_counter() - start
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        pp_fx.export.build_ort_ops()
        rows = run(folder / "pruned", folder / "genai", options.repeats)
    table = Table(title="smollm2, fp32, MLP 40%, onnxruntime, milliseconds")
    columns = ("phase", "threads", "genai dense", "own dense", "pruned", "/ genai", "/ own")
    columns += ("function bodies / genai", "last logits / genai")
    for column in columns:
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in rows:
        ms = row["ms"]
        numbers = [f"{ms[name]:.1f}" for name in ("genai dense", "own dense", "pruned")]
        ratios = [f"{ms['pruned'] / ms[name]:.3f}" for name in ("genai dense", "own dense")]
        others = [f"{ms[name] / ms['genai dense']:.3f}" if name in ms else "" for name in (BODIES, LAST)]
        table.add_row(row["phase"], str(row["threads"]), *numbers, *ratios, *others)
    Console().print(table)
    Console().print(f"export: {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB, weights {weights / 1e9:.2f} GB")
    result = {
        "model": "smollm2, fp32, MLP 40%",
        "export": {"seconds": seconds, "peak_bytes": peak, "weights_bytes": weights},
        "rows": rows,
        "versions": {"onnxruntime": onnxruntime.__version__},
    }
    write_json(options.out.with_suffix(".json"), result)
    labels = [f"{row['phase']}, {row['threads']} threads" for row in rows]
    series = {
        f"/ {name}": [row["ms"]["pruned"] / row["ms"][name] for row in rows] for name in ("genai dense", "own dense")
    }
    bars(options.out.with_suffix(".png"), "SmolLM2 under onnxruntime, MLP 40%", "pruned / dense time", labels, series)


if __name__ == "__main__":
    main()
