"""All GPU figures in one run of 6 minutes (`--quick`: 2): prefill, decoding, products, the slowest row's profile.

    python benchmarks/gpu.py --out benchmarks/results/gpu

bf16, compiled, random weights (time does not depend on them), shapes of Llama-2-7B, Llama-3-8B and 70B, MLP 40%, with
and without heads, every compensation, decode="step". All sides of a row take turns; the JSON is written after every
row. Needs torch, transformers and rich, and runs from a checkout. `--device cpu --tiny` tries the script without a GPU.

- wall: milliseconds from the call to the device's end, host included. device: the sum of the kernels' times.
- static: the same channels cut out of the weights once; ideal: MACs (prefill, probe and compensation counted) or bytes
  (decoding, KV cache counted).
- products: kept rows copied and multiplied by the library, read in place by the kernels of `pp_fx.kernels`, and whole.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
import transformers
from report import STICKY
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import pp_fx
from pp_fx.kernels import gather_linear, gather_output
from pp_fx.measure.bench import ideal_decode, ideal_prefill
from pp_fx.measure.bounds import static_copies

SHAPES = {
    "Llama-2-7B": {},
    "Llama-3-8B": {"intermediate_size": 14336, "num_key_value_heads": 8},
    "Llama-3-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
                    "num_key_value_heads": 8},
    "tiny": {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 500},
}  # fmt: skip
SIDES: dict[str, dict[str, Any]] = {
    "no compensation": {"mlp_compensation": None},
    "mean": {"mlp_compensation": "mean"},
    "least squares": {"compensation_min_tokens": 1},
    "sticky": {},
    "MLP and heads": {"attention_ratio": 0.4},
    "by step": {"decode": "step"},
    "by step, 50%": {"decode": "step", "decode_ratio": 0.5},
}
PRODUCT_ROWS = (1, 16, 64, 256, 1024, 2048, 8192, 20480)


@dataclass(frozen=True)
class Row:
    """One shape; `sides` are pruned ones beside dense and static. `graphs`: under CUDA graphs."""

    model: str
    phase: str
    batch: int
    length: int
    layers: int
    sides: tuple[str, ...] = ("sticky",)
    graphs: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} {self.phase} {self.batch} x {self.length}" + (", CUDA graphs" if self.graphs else "")


ALL = tuple(SIDES)
ROWS = (
    Row("Llama-2-7B", "decode", 1, 512, 16, ("sticky", "MLP and heads"), True),
    Row("Llama-2-7B", "prefill", 20, 1024, 2, ("no compensation", "sticky", "least squares", "MLP and heads")),
    Row("Llama-2-7B", "decode", 32, 512, 16, graphs=True),
    Row("Llama-3-8B", "decode", 1, 512, 8, ("sticky", "by step", "by step, 50%"), True),
    Row("Llama-3-70B", "decode", 1, 512, 3, ("sticky", "by step", "by step, 50%"), True),
    Row("Llama-2-7B", "prefill", 1, 2048, 2),
    Row("Llama-2-7B", "prefill", 1, 512, 2),
    Row("Llama-2-7B", "prefill", 4, 512, 2),
    Row("Llama-3-8B", "decode", 4, 512, 8, ("sticky", "by step"), True),
    Row("Llama-3-8B", "decode", 8, 512, 8, ("sticky", "by step"), True),
    Row("Llama-2-7B", "prefill", 1, 512, 2, graphs=True),
    Row("Llama-3-8B", "prefill", 20, 1024, 2, ("sticky",)),
    Row("Llama-2-7B", "decode", 8, 512, 16),
    Row("Llama-2-7B", "prefill", 20, 1024, 2, graphs=True),
    Row("Llama-3-8B", "decode", 32, 512, 16, graphs=True),
    Row("Llama-3-8B", "prefill", 1, 2048, 2),
)
QUICK = (Row("Llama-2-7B", "prefill", 20, 1024, 2), Row("Llama-2-7B", "decode", 1, 512, 8, graphs=True))
TINY = (
    Row("tiny", "prefill", 2, 64, 2, ALL),
    Row("tiny", "decode", 2, 32, 2, ("sticky", "MLP and heads", "by step"), True),
)


class Timer:
    """Wall and device milliseconds of calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def wall(self, call: Callable[[], Any], count: int) -> float:
        """Of one call, over `count` calls behind each other."""
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self.wait()
        return 1000 * (time.perf_counter() - start) / count

    def kernels(self, call: Callable[[], Any], count: int = 3) -> tuple[float | None, Any]:
        """Sum of the kernels' times of one call, and the profile; None without CUDA."""
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if self.cuda else activity.CPU]) as profile:
            self.wall(call, count)
        found = profile.key_averages()
        if not self.cuda:
            return None, found
        return sum(event.self_device_time_total for event in found) / 1000 / count, found

    def take_turns(self, calls: dict[str, Callable[[], Any]], repeats: int, count: int) -> dict[str, float]:
        """Median wall milliseconds of every call; three turns do not count."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(3 + repeats):
            for name, call in calls.items():
                took = self.wall(call, count)
                if turn >= 3:
                    times[name].append(took)
        return {name: statistics.median(found) for name, found in times.items()}


def dense_model(row: Row, device: torch.device) -> Any:
    """Random weights in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=row.layers, max_position_embeddings=4096, **SHAPES[row.model])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def pruned_model(dense: Any, changes: dict[str, Any], ids: torch.Tensor) -> Any:
    """Calibrated on the row's own tokens, history frozen: every turn does the same."""
    settings = {**STICKY, "mlp_ratio": 0.4, "skip_layers": 0, "freeze_history": True, **changes}
    model = pp_fx.transform(copy.deepcopy(dense), settings)
    return pp_fx.calibrate(model, ids[:2, :512], progress=False)


def caller(model: Any, row: Row, ids: torch.Tensor, steps: int, backend: str) -> Callable[[], Any]:
    """One compiled call: a prompt without KV cache, or a decode step behind an uncompiled prompt."""
    mode: dict[str, Any] = {"mode": "reduce-overhead" if row.graphs else "default"} if backend == "inductor" else {}
    body = torch.compile(model.base_model, fullgraph=True, dynamic=False, backend=backend, **mode)
    if row.phase == "prefill":
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    else:
        cache = StaticCache(config=model.config, max_cache_len=row.length + steps)
        model.base_model(input_ids=ids, past_key_values=cache)
        given = {"input_ids": ids[:, :1].contiguous(), "past_key_values": cache}

    def call() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return body(**given).last_hidden_state

    return call


def measure(row: Row, device: torch.device, repeats: int, backend: str) -> tuple[dict[str, Any], Any]:
    """All sides of a row, and the profile of its slowest pruned side."""
    torch._dynamo.reset()
    timer, decodes = Timer(device), row.phase == "decode"
    dense = dense_model(row, device)
    ids = torch.randint(5, dense.config.vocab_size, (row.batch, row.length), device=device)
    count = 8 if decodes else 4  # behind each other, so that the device need not wait for the host's first launch
    steps = count * (3 + repeats) + 16
    with torch.no_grad():
        models = {name: pruned_model(dense, SIDES[name], ids) for name in row.sides}
        ideals = {}
        for name, model in models.items():
            found = ideal_decode(dense, model, ids, steps) if decodes else ideal_prefill(dense, model, ids)
            ideals[name] = found["blocks"].get("ideal_with_probe", found["blocks"]["ideal"])
        static = static_copies(dense, models["sticky"], ids) if "sticky" in models else None
        sides = {"dense": dense, **({} if static is None else {"static": static.cut}), **models}
        del static
        began = time.perf_counter()
        calls, compiled = {}, {}
        for name, model in sides.items():
            calls[name] = caller(model, row, ids, steps, backend)
            timer.wall(calls[name], 2)
            compiled[name], began = time.perf_counter() - began, time.perf_counter()
        wall = timer.take_turns(calls, repeats, count)
        kernels = {name: timer.kernels(call) for name, call in calls.items()}
    slowest = max(row.sides, key=lambda name: wall[name])
    result = {
        "row": asdict(row),
        "name": row.name,
        "sides": {
            name: {
                "wall_ms": wall[name],
                "ratio": wall[name] / wall["dense"],
                "device_ms": kernels[name][0],
                "device_ratio": kernels[name][0] / kernels["dense"][0] if kernels["dense"][0] else None,
                "ideal": ideals.get(name),
                "compile_s": compiled[name],
            }
            for name in sides
        },
    }
    return result, kernels[slowest][1]


def products(device: torch.device, dtype: torch.dtype, hidden: int, channels: int, rows: tuple[int, ...]) -> list[dict]:
    """Milliseconds of both products of Llama-2-7B's MLP, by rows of the input; 60% of the channels kept."""
    timer, found = Timer(device), []
    weight = torch.randn(channels, hidden, device=device, dtype=dtype)
    count = -(-6 * channels // 10 // 64) * 64
    kept = torch.randperm(channels, device=device)[:count].sort().values
    for size in rows:
        x, z, wide = (torch.randn(size, n, device=device, dtype=dtype) for n in (hidden, count, channels))
        calls = {
            "linear whole": lambda x=x: x @ weight.t(),
            "linear copied": lambda x=x: x @ weight[kept].t(),
            "linear in place": lambda x=x: gather_linear(x, weight, kept),
            "output whole": lambda wide=wide: wide @ weight,
            "output copied": lambda z=z: z @ weight[kept],
            "output in place": lambda z=z: gather_output(z, weight, kept),
        }
        found.append({"rows": size, **timer.take_turns(calls, 9, 20 if size < 4096 else 4)})
    return found


def write(file: Path, document: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Every side of every row beside its ideal."""
    table = Table("row", "side", "wall ms", "/ dense", "device ms", "/ dense", "ideal")
    for row in rows:
        for name, side in row["sides"].items():
            device = [f"{side[k]:.3f}" if side[k] else "" for k in ("device_ms", "device_ratio", "ideal")]
            table.add_row(row["name"], name, f"{side['wall_ms']:.3f}", f"{side['ratio']:.3f}", *device)
    return table


def plot(file: Path, result: dict[str, Any]) -> None:
    """Every pruned side beside static and ideal, as PNG; nothing where matplotlib or typer is missing."""
    try:
        from report import bars
    except ImportError:
        return
    sides = [(row, name, side) for row in result["rows"] for name, side in row["sides"].items() if side["ideal"]]
    series = {
        "measured": [side["ratio"] for _, _, side in sides],
        "ideal (MACs or bytes)": [side["ideal"] for _, _, side in sides],
    }
    labels = [f"{row['name']}: {name}" for row, name, _ in sides]
    bars(file, f"{result['device']}, MLP 40%, bf16, compiled", "time, pruned / dense", labels, series)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--quick", action="store_true", help="two rows and the products, 2 minutes")
    parser.add_argument("--minutes", type=float, default=6, help="no row begins later")
    parser.add_argument("--missing", action="store_true", help="keep what the file holds of this device and versions")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds it, for example decode")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --device cpu --tiny tries the script without one")
    console, began = Console(width=140), time.monotonic()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "pp_fx": pp_fx.__version__}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result: dict[str, Any] = {"device": name, "versions": versions, "rows": [], "products": [], "left_out": []}
    sizes = (128, 320, (1, 64)) if options.tiny else (4096, 11008, PRODUCT_ROWS)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    file = options.out.with_suffix(".json")
    if options.missing and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if (before["device"], before["versions"]) == (name, versions):
            result.update(rows=before["rows"], products=before["products"])
    if not result["products"]:
        result["products"] = products(device, dtype, *sizes)
        write(file, result)
    slowest: tuple[float, str, Any] = (0.0, "", None)
    rows, there = TINY if options.tiny else QUICK if options.quick else ROWS, {r["name"] for r in result["rows"]}
    for row in (r for r in rows if options.only in r.name and r.name not in there):
        if time.monotonic() - began > 60 * (1.5 if options.quick else options.minutes):
            result["left_out"].append(row.name)
            continue
        try:
            found, profile = measure(row, device, options.repeats, options.backend)
        except Exception as error:  # one row that fails must not take the others with it
            found, profile = None, None
            result["left_out"].append(f"{row.name}: {type(error).__name__}: {str(error)[:500]}")
            console.print(f"[red]{result['left_out'][-1]}")
        if found is not None:
            result["rows"].append(found)
            ratios = ", ".join(f"{side} {x['ratio']:.3f}" for side, x in found["sides"].items() if side != "dense")
            console.print(f"{time.monotonic() - began:.0f} s: {row.name}: {ratios}")
            worst = max(x["ratio"] for x in found["sides"].values())
            slowest = max(slowest, (worst, row.name, profile), key=lambda s: s[0])
        write(file, result)
        if device.type == "cuda":
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    console.print(table_of(result["rows"]))
    shown = Table(*result["products"][0], title="products, ms")
    for line in result["products"]:
        shown.add_row(*(f"{x:.4f}" if isinstance(x, float) else str(x) for x in line.values()))
    console.print(shown)
    plot(options.out.with_suffix(".png"), result)
    if slowest[2] is not None:
        key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        text = f"{slowest[1]}\n{slowest[2].table(sort_by=key, row_limit=30, max_name_column_width=80)}\n"
        options.out.with_suffix(".profile.txt").write_text(text, encoding="utf-8")
    if result["left_out"]:
        console.print("left out:", result["left_out"])


if __name__ == "__main__":
    main()
