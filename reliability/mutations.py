"""Deliberate faults, each of which at least one test must catch.

    python reliability/mutations.py

Every fault is put into a copy of the project, where the tests named beside it run; a fault that they do not notice is a
hole in them.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "mutations.json"


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in `file`; `tests` are pytest arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = (
    Fault(
        "history is never updated",
        "pp_fx/runtime/history.py",
        "    if not plan.selects:\n        return\n",
        "    return\n",
        "tests/behaviour/test_reference.py",
    ),
    Fault(
        "one kept row off by one",
        "pp_fx/runtime/select.py",
        "    kept = top(scores, state.kept_units, plan.exports)",
        "    kept = (top(scores, state.kept_units, plan.exports) + 1).clamp(max=state.units - 1)",
        "tests/behaviour/test_reference.py tests/behaviour/test_campaign.py",
    ),
    Fault(
        "lowest scores are kept",
        "pp_fx/runtime/select.py",
        "    kept = top(scores,",
        "    kept = top(-scores,",
        "tests/behaviour/test_reference.py",
    ),
    Fault(
        "gate and up swapped",
        "pp_fx/runtime/gather.py",
        "    return tuple(F.linear(x, w, b) for w, b in linears)",
        "    return tuple(F.linear(x, w, b) for w, b in reversed(linears))",
        "tests/behaviour/test_reference.py",
    ),
    Fault(
        "padding counts as text",
        "pp_fx/runtime/probe.py",
        "torch.where(real, left_aligned(energy, start), 0.0)",
        "left_aligned(energy, start)",
        "tests/behaviour/test_reference.py tests/behaviour/test_campaign.py",
    ),
    Fault(
        "positions count from the batch's first column",
        "pp_fx/runtime/probe.py",
        "start = first_real(real)",
        "start = first_real(real) * 0",
        "tests/behaviour/test_reference.py",
    ),
    Fault(
        "what a layer's code reads may change",
        "pp_fx/rewrite/bypassed.py",
        "if value is not before and not same(",
        "if False and not same(",
        "tests/behaviour/test_bypassed.py",
    ),
    Fault(
        "autocast reaches the corrections",
        "pp_fx/process_settings.py",
        "        if not kinds:\n",
        "        if True:\n",
        "tests/behaviour/test_process_settings.py",
    ),
    Fault(
        "writes into views are lost",
        "pp_fx/capture/trace.py",
        "schema.is_mutable and not node.users",
        "False",
        "tests/families/test_model_classes.py",
    ),
    Fault(
        "wrong key/value heads",
        "pp_fx/runtime/model_calls.py",
        "heads = state.kv_head.index_select(0, selection.kept)",
        "heads = state.kv_head.index_select(0, selection.kept).flip(0)",
        "tests/behaviour/test_reference.py",
    ),
    Fault(
        "query heads of the probe in the wrong order",
        "pp_fx/runtime/model_calls.py",
        "permute(0, 2, 3, 1, 4)",
        "permute(0, 2, 1, 3, 4)",
        "tests/behaviour/test_reference.py",
    ),
    Fault(
        "selection of the module, not of the cache",
        "pp_fx/runtime/selections.py",
        "def selections_on(cache: Any) -> Selections | None:",
        "_held: dict = {}\n\n\ndef selections_on(cache: Any) -> Selections | None:\n"
        "    held = _selections_on(cache) or _held.get(0)\n    _held[0] = held\n    return held\n\n\n"
        "def _selections_on(cache: Any) -> Selections | None:",
        "tests/behaviour/test_cache.py tests/behaviour/test_generate.py",
    ),
    Fault(
        "stale norms after load_state_dict",
        "pp_fx/rewrite/layer.py",
        "def _refresh_after_load(layer: Any, _incompatible: Any) -> None:\n    layer.refresh()",
        "def _refresh_after_load(layer: Any, _incompatible: Any) -> None:\n    pass",
        "tests/system/test_saving.py tests/behaviour/test_transform.py",
    ),
    Fault(
        "compensation forgotten",
        "pp_fx/runtime/gather.py",
        "    if len(factors) == 1:\n        return kept + factors[0].t()\n",
        "    return kept\n",
        "tests/behaviour/test_reference.py tests/behaviour/test_campaign.py",
    ),
    Fault(
        "a sample gone wrong decides for all",
        "pp_fx/runtime/probe.py",
        "torch.where(z.abs() <= min(_LARGEST, torch.finfo(z.dtype).max), z, 0.0)",
        "z",
        "tests/behaviour/test_state_safety.py",
    ),
    Fault(
        "zero points of groups are added",
        "pp_fx/kernels/native/grouped.h",
        "? -zeros[g] *",
        "? zeros[g] *",
        "tests/unit/kernels/test_strongest.py",
    ),
    Fault(
        "weights not laid out anew after load_state_dict",
        "pp_fx/rewrite/layer.py",
        "_lay_out(parameter, state.steps and path == group.output.path)",
        "pass",
        "tests/system/test_saving.py tests/behaviour/test_transform.py",
    ),
    Fault(
        "decoding multiplies with the prompt's whole weight",
        "pp_fx/runtime/gather.py",
        "return compact_linear(z, selection.output)",
        "return F.linear(z, weight[:, : z.shape[-1]], bias)",
        "tests/behaviour/test_decode.py tests/behaviour/test_campaign.py",
    ),
    Fault(
        "every prompt keeps its selection in new memory",
        "pp_fx/runtime/buffers.py",
        "    old.copy_(value)\n    return old",
        "    return own(value)",
        "tests/behaviour/test_cuda_graphs.py",
    ),
    Fault(
        "what a compiled prompt kept is an output of its graph",
        "pp_fx/runtime/buffers.py",
        "    if not _fits(old, value):",
        "    if torch.compiler.is_compiling() or not _fits(old, value):",
        "tests/behaviour/test_cuda_graphs.py",
    ),
    Fault(
        "an emptied cache goes on with its selection",
        "pp_fx/runtime/selections.py",
        "            selection.forget()\n",
        "            pass\n",
        "tests/behaviour/test_cache.py",
    ),
    Fault(
        "calibration carries on into inference",
        "pp_fx/runtime/modes.py",
        "                setattr(o, name, value)\n\n\n@",
        "                pass\n\n\n@",
        "tests/unit/calibration/test_calibrate.py tests/behaviour/test_state_safety.py",
    ),
    Fault(
        "calibration forgets the other ranks",
        "pp_fx/calibration/collect.py",
        "add_padded(sums[key], value)",
        "value",
        "tests/system/test_distributed.py",
    ),
    Fault(
        "a function that writes is not declared",
        "passes/base.py",
        "            gather.rows_ahead,\n",
        "",
        "tests/behaviour/test_effects.py",
    ),
    Fault(
        "nobody looks at what a pass promises",
        "passes/base.py",
        "        _check_roles(block, self.ensures,",
        "        _check_roles(block, (),",
        "tests/unit/passes/test_passes.py",
    ),
    Fault(
        "codes are read beside their zero",
        "export/quantized_weights.py",
        "numbers = codes.float() - (1 << (self.bits - 1))",
        "numbers = codes.float() - (1 << (self.bits - 1)) + 1",
        "tests/unit/export/test_quantized_weights.py",
    ),
    Fault(
        "every token is multiplied with the first one's zeros",
        "pp_fx/kernels/native/quantized.h",
        "-zero_ * x.sums(first + t)[b]",
        "-zero_ * x.sums(first)[b]",
        "tests/system/test_quantized_export.py -k operators",
    ),
    Fault(
        "a single block at a row's end is left out",
        "pp_fx/kernels/native/quantized.h",
        "    if (whole < pairs_) {",
        "    if (whole > pairs_) {",
        "tests/system/test_quantized_export.py -k operators",
    ),
    Fault(
        "an engine prunes tokens that decode",
        "pp_fx/runtime/engine_step.py",
        "inside[a:b] = b - a > 1",
        "inside[a:b] = b - a > 0",
        "tests/unit/runtime/test_engine_step.py",
    ),
    Fault(
        "an engine prunes steps with too few prompt tokens",
        "pp_fx/runtime/engine_step.py",
        "count >= settings.min_select_tokens or",
        "count >= settings.min_select_tokens // 2 or",
        "tests/unit/runtime/test_engine_step.py",
    ),
    Fault(
        "the last kept columns of a row are left out",
        "pp_fx/kernels/native/columns.h",
        "for (; done < count; ++done)",
        "for (; done + 1 < count; ++done)",
        "tests/unit/kernels/test_kept_columns.py",
    ),
    Fault(
        "the probe's rows are multiplied with whole registers alone",
        "pp_fx/kernels/native/bfloat16.h",
        "for (; k < depth; k += kPairs) {",
        "for (; k + kPairs <= depth; k += kPairs) {",
        "tests/unit/kernels/test_few_rows.py",
    ),
    Fault(
        "a step's prompts and its other tokens change places",
        "pp_fx/runtime/split.py",
        "    prompts, others = parts",
        "    others, prompts = parts",
        "tests/behaviour/test_continuous_batching.py",
    ),
    Fault(
        "shards are not summed",
        "pp_fx/runtime/shard_sum.py",
        "    dist.all_reduce(partial, group=layer.shards.group)\n",
        "",
        "tests/system/test_tensor_parallel.py",
    ),
)


def caught(fault: Fault, folder: Path) -> bool:
    """Whether the tests, which pass without the fault, fail with it, in a copy of the project."""
    if not _pass_without(fault.tests):
        raise SystemExit(f"{fault.name}: {fault.tests} fail without it, too")
    _copy(folder)
    path = folder / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise SystemExit(
            f"{fault.name}: its place in {fault.file} is found {text.count(fault.old)} times; mend the list"
        )
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    return not _pass(fault.tests, folder)


@functools.cache
def _pass_without(tests: str) -> bool:
    with tempfile.TemporaryDirectory() as name:
        _copy(Path(name))
        return _pass(tests, Path(name))


def _copy(folder: Path) -> None:
    for name in ("pp_fx", "passes", "export", "tests", "docs", "reliability"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("passes", "export"):
        (folder / "pp_fx" / name).symlink_to(folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)


def _pass(tests: str, folder: Path) -> bool:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PP_FX_DRAWS": "20"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=unshrunk"]
    command = [sys.executable, "-m", "pytest", *options, *tests.split()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{tests}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main() -> None:
    table, results = Table("fault", "caught"), {}
    for fault in track(FAULTS, "faults", console=Console(stderr=True)):
        with tempfile.TemporaryDirectory() as name:
            results[fault.name] = caught(fault, Path(name))
        table.add_row(fault.name, "yes" if results[fault.name] else "NO")
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console().print(table)
    sys.exit(not all(results.values()))


if __name__ == "__main__":
    main()
