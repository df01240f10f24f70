"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on random shapes, types and values.

    python reliability/sanitize.py --draws 4000

Every tensor has an allocation of its own, so that a read or write beside it is seen. First a library with a deliberate
fault must be reported, or the run says nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from pp_fx.export import native_ops
from pp_fx.kernels import NATIVE_SOURCES
from pp_fx.native_library import FLAGS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "sanitize.json"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g", "-march=native")
FAULT = ("  for (; k < last; ++k)\n    for (size_t m", "  for (; k <= last; ++k)\n    for (size_t m")
SIZES = (0, 1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 70, 130, 400)


def build(folder: Path, fault: bool) -> Path:
    """The library with the sanitizers in it; with a loop that runs one row too far where `fault` is set."""
    for source in (*native_ops.LIBRARY.main.parent.iterdir(), *NATIVE_SOURCES.iterdir()):
        text = source.read_text(encoding="utf-8")
        if fault and source.name == "products.h":
            assert text.count(FAULT[0]) == 1
            text = text.replace(*FAULT)
        (folder / source.name).write_text(text, encoding="utf-8")
    library = folder / "ops.so"
    flags = (*FLAGS, *SANITIZERS, '-DPP_FX_VERSION="sanitized"')
    for main in ("ops", "kernels"):
        subprocess.run(["g++", *flags, str(folder / f"{main}.cpp"), "-o", str(folder / f"{main}.so")], check=True)
    return library


def start(library: Path, draws: int, seed: int) -> subprocess.CompletedProcess:
    """`fuzz` in a process into which the sanitizers' runtimes are loaded first."""
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name=lib{n}.so"], text=True).strip() for n in ("asan", "ubsan")
    ]
    # leaks are Python's own; the fuzzed sizes stay small
    environment = {**os.environ, "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, __file__, "--library", str(library), "--draws", str(draws), "--seed", str(seed)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def fuzz(library: Path, draws: int, seed: int) -> Counter:
    """Random calls: what fits must give the operator's definition, what does not must be an error status."""
    sys.path.insert(0, str(ROOT))
    from tests.system.test_native_ops import DTYPES, PRODUCTS, expected, run, session

    random, counts = np.random.default_rng(seed), Counter()
    kinds = [(op, dtype) for op in PRODUCTS for dtype in DTYPES] + [("Solve", "float32")]
    made = {
        kind: session(kind[0], PRODUCTS.get(kind[0], 2), kind[1], library, enable_cpu_mem_arena=False) for kind in kinds
    }
    for _ in range(draws):
        op, dtype = kinds[random.integers(len(kinds))]
        batch, length, hidden, kept = random.integers(4), random.integers(9), *random.choice(SIZES, 2)
        if op == "Solve":
            root = random.standard_normal((hidden, hidden))
            arrays = [root @ root.T / max(hidden, 1) + np.eye(hidden), random.standard_normal((hidden, kept))]
        else:
            last = kept if op == "CompactOutput" else hidden
            weights = [random.standard_normal((kept, hidden)) for _ in range(PRODUCTS[op] - 1)]
            arrays = [random.standard_normal((batch, length, last)), *(w / np.sqrt(max(last, 1)) for w in weights)]
        fits, plain = random.random() < 0.8, random.random() < 0.9
        if not fits:  # one axis of one input is cut off or made longer
            index = random.integers(len(arrays))
            axis = random.integers(arrays[index].ndim)
            arrays[index] = np.resize(arrays[index], [n + (i == axis) for i, n in enumerate(arrays[index].shape)])
        if not plain and arrays[0].size:
            arrays[0].flat[random.integers(arrays[0].size)] = random.choice([np.nan, np.inf, -np.inf, 1e38])
        given = [array.astype(DTYPES[dtype]) for array in arrays]
        try:
            found = run(made[op, dtype], dtype, *given)
        except Exception as error:  # onnxruntime's exceptions share no base class
            counts["refused" if "do not fit each other" in str(error) and not fits else "wrong"] += 1
            continue
        try:
            right = expected(op, *given)
        except Exception:  # numpy: the shapes do not fit, or a matrix is singular
            counts["not a number" if not plain else "wrong"] += 1
            continue
        near = {"float32": 1e-4, "float16": 8e-3, "bfloat16": 8e-2}[dtype]
        counts["right" if not plain or np.allclose(found, right, atol=near, rtol=near) else "wrong"] += 1
    kernels = library.with_name("kernels.so")
    counts += fuzz_quantized(library, draws // 4, random)
    return counts + fuzz_kept(kernels, draws, random) + fuzz_steps(kernels, draws, random)


def fuzz_quantized(library: Path, draws: int, random: np.random.Generator) -> Counter:
    """Random calls of the operators with quantized weights, which share their steps with those of plain ones."""
    from tests.system.test_quantized_export import INPUTS, ROUNDED, expected, operands, session

    counts: Counter = Counter()
    for _ in range(draws):
        name, bits = str(random.choice(list(INPUTS))), int(random.choice((4, 8)))
        sizes = (random.integers(1, 20), random.integers(1, 90), random.integers(1, 6), random.integers(1, 70))
        given = operands(name, *map(int, sizes), bits, int(random.integers(2**31)))
        found = session(name, given, bits, library).run(None, {n: given[n] for n in INPUTS[name]})[0]
        wanted = expected(name, given)
        near = np.abs(found - wanted).max() < ROUNDED * (np.abs(wanted).max() + 1)
        counts["right" if near else "wrong"] += 1
    return counts


def fuzz_kept(library: Path, draws: int, random: np.random.Generator) -> Counter:
    """Random calls of torch's own kernels for kept columns and for products with kept rows of bf16."""
    import ml_dtypes

    from pp_fx.kernels.native_kernels import signed

    kernels, counts = signed(library), Counter()
    for _ in range(draws):
        rows, width, tokens = (int(n) for n in random.integers(1, (50, 300, 30)))
        given = random.standard_normal((rows, width)).astype(random.choice((np.float32, np.float16, np.int8)))
        kept = np.flatnonzero(random.random(width) < random.choice((0.1, 0.6, 1.0)))
        kept = random.permutation(kept) if random.random() < 0.2 else kept
        found = np.empty((rows, len(kept)), given.dtype)
        pointers = (given.ctypes.data, width, kept.ctypes.data, len(kept), found.ctypes.data)
        kernels.pp_fx_columns(given.itemsize, *pointers, rows, width, 2)
        right = np.array_equal(found, given[:, kept])
        weight, x = (random.standard_normal((n, width)).astype(ml_dtypes.bfloat16) for n in (rows, tokens))
        kept = np.flatnonzero(random.random(rows) < 0.6)
        made = np.zeros((tokens, len(kept)), ml_dtypes.bfloat16)
        pointers = (weight.ctypes.data, width, kept.ctypes.data, len(kept), x.ctypes.data, made.ctypes.data)
        if kernels.pp_fx_kept_rows_linear(*pointers, tokens, width, 2) == 0:
            wanted = x.astype(np.float64) @ weight[kept].astype(np.float64).T
            right &= np.allclose(made.astype(np.float64), wanted, atol=0.1, rtol=0.02)
        counts["right" if right else "wrong"] += 1
    return counts


def fuzz_steps(library: Path, draws: int, random: np.random.Generator) -> Counter:
    """Random MLPs over the strongest channels: weights of fp32, of int8 with scales for rows, or for groups."""
    from pp_fx.kernels.native_kernels import signed

    kernels, counts = signed(library), Counter()
    for _ in range(draws):
        kind = random.choice(("plain", "rows", "groups"))
        group, tokens, out = int(random.choice((1, 3, 8, 16, 17, 32, 40))), *map(int, random.integers(1, (6, 90)))
        hidden, channels = (group * int(n) for n in random.integers(1, 5, 2))
        x, factor = (random.standard_normal((tokens, n)).astype(np.float32) for n in (hidden, channels))
        strength, count = np.abs(factor), int(random.integers(1, channels + 1))
        up, down = (random.integers(-8, 8, (channels, n)).astype(np.int8) for n in (hidden, out))
        scales, zeros, size = [None, None], [None, None], 0
        wide = [up.astype(np.float32), down.astype(np.float32)]
        if kind == "plain":
            up, down = wide
        elif kind == "rows":
            scales = [random.random(n).astype(np.float32) for n in (channels, out)]
            wide = [wide[0] * scales[0][:, None], wide[1] * scales[1]]
        else:
            size, shapes = group, ((channels, hidden // group), (channels // group, out))
            scales = [random.random(shape).astype(np.float32) for shape in shapes]
            zeros = [random.integers(-2, 3, shape).astype(np.int8) * int(random.integers(2)) for shape in shapes]
            spread = [[part.repeat(group, 1 - i) for i, part in enumerate(both)] for both in (scales, zeros)]
            wide = [(w - z) * s for w, s, z in zip(wide, *spread, strict=True)]
        found = np.empty((tokens, out), np.float32)
        parts = [
            (w.ctypes.data, w.shape[1], *(p if p is None else p.ctypes.data for p in both), size, None)
            for w, *both in zip((up, down), scales, zeros, strict=True)
        ]
        given = strength.ctypes.data, factor.ctypes.data, x.ctypes.data
        kernels.pp_fx_strongest(
            0, *given, *parts[0], *parts[1], found.ctypes.data, *strength.shape, hidden, out, count, 2
        )
        least = np.sort(strength, 1)[:, [channels - count]]
        right = np.where(strength >= least, factor * (x @ wide[0].T), 0) @ wide[1]
        near = np.abs(found - right).max() <= 1e-4 * (np.abs(right).max() + 1)
        counts["right" if near else "wrong"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.library is not None:
        print(json.dumps(fuzz(options.library, options.draws, options.seed)))
        return
    with tempfile.TemporaryDirectory() as name:
        runs = {}
        for kind in track(("fault", "library"), "sanitizers", console=Console(stderr=True)):
            folder = Path(name, kind)
            folder.mkdir()
            runs[kind] = start(build(folder, kind == "fault"), options.draws, options.seed)
    reports = {kind: "Sanitizer" in done.stderr or "runtime error" in done.stderr for kind, done in runs.items()}
    if not reports["fault"]:
        sys.exit(f"the deliberate fault was not reported, so this run says nothing:\n{runs['fault'].stderr[-3000:]}")
    if runs["library"].returncode:
        sys.exit(runs["library"].stderr[-6000:])
    counts = json.loads(runs["library"].stdout.splitlines()[-1])
    result = {"draws": options.draws, **counts, "reports": int(reports["library"]), "fault_reported": True}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    Console().print(result)
    sys.exit(counts.get("wrong", 0) > 0 or reports["library"])


if __name__ == "__main__":
    main()
