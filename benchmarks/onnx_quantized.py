"""Exported files with weights in 8 and 4 bits: bytes, time and perplexity beside onnxruntime-genai's dense files.

Files run interleaved in one process, on one thread; medians of wall time. Perplexity is that of prompts of 512 tokens
of WikiText-2, all logits. Needs what `onnx_runtime.py` needs:

    python benchmarks/onnx_quantized.py [MODEL ..] --text-dir wikitext-2     # names, folders or GGUF files
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx_runtime import Genai, Ours, medians
from report import bars, write_json
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import pp_fx
import pp_fx.text
from pp_fx.models import load

LENGTH = 512
DENSE = ("fp32", "int4")
DENSE_STEPS, BODIES = ", decoding dense", ", function bodies"


def perplexity(call: Any, windows: torch.Tensor) -> float:
    """Of a call that gives logits, over windows [n, 512], one at a time."""
    total = 0.0
    for ids in windows[:, None]:
        logits = call(ids)[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    return float(torch.tensor(total / len(windows)).exp())


def write_files(model: str, folder: Path, ratio: float | None) -> None:
    """genai's dense files and ours, pruned by the default or by `ratio`."""
    loaded, tokenizer = load(model, torch.float32)
    loaded.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    for precision in DENSE:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(folder / "hf"), "-e", "cpu"]
        options = ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"] if precision == "int4" else []
        where = ["-o", str(folder / f"genai dense {precision}"), "-p", precision, *options]
        subprocess.run([*builder, *where], check=True, capture_output=True)
    settings = {} if ratio is None else {"mlp_ratio": ratio}
    text = pp_fx.text.sequences(pp_fx.text.read(pp_fx.text.PYTHON_DOCS), tokenizer, 16, LENGTH)
    for decode_ratio, kinds in ((None, (None, "int8", "int4")), (0.0, ("int4",))):
        pp_fx.transform(loaded, pp_fx.ProbePruningConfig(**settings, decode="step", decode_ratio=decode_ratio))
        pp_fx.calibrate(loaded, text)
        for weights in kinds:
            name = f"pruned {weights or 'fp32'}" + DENSE_STEPS * (decode_ratio == 0)
            pp_fx.export.onnx(loaded, folder / name, weights=weights, verify=False)
        pp_fx.restore(loaded)


def measure(model: str, text: str, windows: int, ratio: float | None, repeats: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(model, folder, ratio)
        _, tokenizer = load(model, torch.float32)
        ids = pp_fx.text.sequences(text, tokenizer, windows, LENGTH)
        sides: dict[str, Any] = {f"genai dense {p}": Genai(folder / f"genai dense {p}", 1) for p in DENSE}
        ours = [*(f"pruned {p}" for p in ("fp32", "int8", "int4")), f"pruned int4{DENSE_STEPS}"]
        sides |= {name: Ours(folder / name, 1) for name in ours}
        sides[f"pruned int4{BODIES}"] = Ours(folder / "pruned int4", 1, library=None)
        rows = []
        prompts = medians({n: partial(side, ids[:1]) for n, side in sides.items()}, repeats, 1)
        for side in sides.values():
            side(ids[:1, :128])
        token = torch.tensor([[5]])
        steps = medians({n: partial(side, token, True) for n, side in sides.items()}, 10 * repeats, 5)
        for side_name, side in tqdm(sides.items(), desc=model):
            place = side_name.removesuffix(BODIES)
            rows.append(
                {
                    "model": Path(model).stem,
                    "file": side_name,
                    "bytes": sum(f.stat().st_size for f in (folder / place).glob("model.onnx*")),
                    "perplexity": perplexity(side, ids),
                    "prefill_ms": prompts[side_name],
                    "decode_ms": steps[side_name],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smollm2"])
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--mlp-ratio", type=float, default=None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/onnx-quantized"))
    options = parser.parse_args()
    pp_fx.export.build_ort_ops()
    text = (options.text_dir / "test.txt").read_text(encoding="utf-8")
    rows = []
    for model in options.models:
        rows += measure(model, text, options.windows, options.mlp_ratio, options.repeats)
    columns = ("model", "file", "MB", "perplexity", "prefill 1 x 512, ms", "decode 1 x 128, ms")
    table = Table(title="onnxruntime, one thread")
    for column in columns:
        table.add_column(column)
    for row in rows:
        numbers = (
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['perplexity']:.2f}",
            f"{row['prefill_ms']:.1f}",
            f"{row['decode_ms']:.2f}",
        )
        table.add_row(row["model"], row["file"], *numbers)
    Console().print(table)
    labels = [f"{row['model']}, {row['file']}" for row in rows]
    base = {row["model"]: row for row in rows if row["file"] == "genai dense int4"}
    series = {
        phase: [row[f"{phase}_ms"] / base[row["model"]][f"{phase}_ms"] for row in rows]
        for phase in ("prefill", "decode")
    }
    bars(options.out.with_suffix(".png"), "onnxruntime, one thread", "time / genai dense int4", labels, series)
    ratio = pp_fx.ProbePruningConfig().mlp_ratio if options.mlp_ratio is None else options.mlp_ratio
    versions = {"onnxruntime": onnxruntime.__version__}
    write_json(
        options.out.with_suffix(".json"),
        {"mlp_ratio": ratio, "windows": options.windows, "rows": rows, "versions": versions},
    )


if __name__ == "__main__":
    main()
