"""Write docs/reliability.md from the results of the scripts beside this one.

python reliability/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
_HEAD = """# Reliability

A wrong logit looks like a right one, so the promise is made testable. The figures on this page are written by
`python reliability/table.py` from the results of the runs named in each section (`reliability/results/`).
"""
_PROMISES = """## What is safe

- **Selections** live on the KV cache. Requests that interleave, or threads that bring their own caches, do not
  meet. The history is one set of buffers on the model: freeze it (`pp_fx.history_frozen(model)`,
  `freeze_history=True`) where several threads run the model at once; otherwise their updates race.
- **Numbers that are not finite**, or that overflow, in one sample of a batch are left out of the probe: the
  other samples stay as they should be, and the call is not learnt from.
- **Exceptions and Ctrl-C** in a forward pass, `calibrate`, `transform`, `save_pretrained` or `export` leave the
  model and the files on disk as they were.
- **fork and DataLoader workers** work; **pickle** of a transformed model, and so `torch.save(model)` and
  `spawn` with the model as an argument, is refused: save it, or transform it in the worker.
- **Files**: no pickle, no code from files, no network unless asked. History files and exported folders carry
  checksums; weights outside of an exported folder are refused. The weights that `save_pretrained` writes are
  transformers' ordinary ones, without a checksum.

Tests: `tests/behaviour/test_state_safety.py`, `tests/system/test_saving.py`, `tests/system/test_export.py`.
"""

_FOUND = """## What these runs and hostile reviews found, mended since

- transformers 5.24 names the KV cache's argument otherwise: no transformed model ran there.
- A number that was not finite in one sample made every sample of its batch not finite.
- `transform`, interrupted between two steps, left attributes behind.
- A flipped bit in a history file went unnoticed: it carries a checksum now.
- Adapters and hooks put inside a transformed layer were ignored in silence: they are refused now.
- Gradient checkpointing, which runs a layer twice, selected twice and gave wrong gradients: refused where the history
  learns.
- `generate_batch` selected at every step (refused then; since served, [by step](serving.md)); a cache could be carried
  over to a copy with other weights: refused.
- `calibrate` under the guard left small batches out.
- An exported model learnt from prompts that were too short to probe.
- Under CUDA graphs, and on every GPU with generate()'s own compilation, decode steps read what an earlier step's graph
  had returned, after it was overwritten: other tokens, or a crash. Calls that overwrite their outputs are tested on a
  CPU (`tests/helpers/overwriting.py`).
- torch 2.11, whose `is_exporting()` is true in everything that it compiles, compiled no transformed model.
- `from_pretrained` of a revision, or with `cache_dir` or `subfolder`, did not find the history.

- One padded column on the left cost a probe one of its two rows: positions count from each sample's first real token.
- What a layer's code reads could be changed behind its graph's back; torch's default dtype, device and autocast reached
  what was computed once and kept.
- ONNX files declared sizes that decoding contradicts; GPT-2's, Falcon's and Gemma's could not be exported or checked.
- The comparison of an exported file failed at real sizes, where single sequences have near-ties in their steps: it is
  of the median sequence there, and a slow test exports SmolLM2.
- A classifier's folder gave perplexities of a random LM head; a byte order mark was text.

Each has a test.
"""


def read(name: str) -> Any:
    """A result, or None where its script has not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def rows(header: list[str], lines: list[list[Any]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in cells)


def campaign(found: dict[str, Any]) -> str:
    return f"""## Differential campaign

`python reliability/campaign.py`: family, sizes, configuration, dtype, padding, attention core, KV cache and way
of running (eager, in pieces, `generate`, compiled) are drawn together; every draw is compared with the
untransformed model whose dropped channels are set to zero by hooks, and must repeat itself, ignore what padding
holds and follow a permutation of its samples.

{rows(["draws", "agree", "differ"], [[found["passing"] + found["failing"], found["passing"], found["failing"]]])}"""


def soak(found: dict[str, Any]) -> str:
    lines = [
        [
            name,
            r["requests"],
            f"{r['leaked']} of {r['checked']}",
            *(f"{r[key]:.1f}" for key in ("mb_at_half", "mb_at_end")),
            f"{r['mb_per_1000']:.4f}",
            f"{r['graphs_at_half']} -> {r['graphs_at_end']}" if name == "compiled" else "",
        ]
        for name, r in found.items()
    ]
    header = ["", "requests", "leaks found", "MiB at half", "MiB at the end", "MiB per 1000 requests", "graphs"]
    return f"""## Soak

`python reliability/soak.py`: requests of random sizes on a tiny model, four open at a time; one in fifty is run
again alone and must give the same.

{rows(header, lines)}"""


def artifacts(found: dict[str, Any]) -> str:
    results = ("refused", "harmless", "changed setting", "FAILED")
    lines = [[kind, sum(c.values()), *(c.get(name, 0) for name in results)] for kind, c in found["counts"].items()]
    return f"""## Damaged files

`python reliability/artifacts.py`: folders truncated, with flipped bits, extended, without a file, or with a
changed setting. "Harmless" loads give the right logits; a setting changed to another valid one gives other
logits, rightly.

{rows(["folder", "tried", *results[:-1], "failures"], lines)}"""


def mutations(found: dict[str, bool]) -> str:
    lines = [[name, "yes" if caught else "**no**"] for name, caught in found.items()]
    return f"""## Deliberate faults

`python reliability/mutations.py`: each is put into a copy of the project, whose tests must fail. Caught:
{sum(found.values())} of {len(found)}.

{rows(["fault", "caught"], lines)}"""


def sanitize(found: dict[str, Any]) -> str:
    line = [found["draws"], found["right"], found["refused"], found.get("wrong", 0), found["reports"]]
    return f"""## Native kernels under sanitizers

`python reliability/sanitize.py`: random shapes (also such that do not fit), types and values through the compiled
kernels of onnxruntime and torch, built with AddressSanitizer and UndefinedBehaviorSanitizer. A library with a
deliberate read beyond the end was reported in the same run.

{rows(["calls", "right", "refused", "wrong", "reports"], [line])}"""


def versions(found: list[dict[str, Any]]) -> str:
    lines = []
    for job in found:
        used = job.get("versions", {})
        names = [used.get(n, "") for n in ("python", "torch", "transformers", "onnxruntime")]
        tests = f"{job.get('passed', 0)} passed, {job.get('failed', 0)} failed"
        tests += f" ({len(job['mended'])} after they were mended)" if job.get("mended") else ""
        lines.append([job["asked"], *names, job["result"], tests if used else job.get("reason", "")])
    return f"""## Versions

`python reliability/versions.py` runs the core tests with other versions; continuous integration runs `make test`
with those of `constraints.txt`. Older ones than pp_fx needs are refused at import.

{rows(["job", "Python", "torch", "transformers", "onnxruntime", "result", ""], lines)}"""


def model_classes(found: dict[str, Any]) -> str:
    classes = found["classes"].values()
    kinds = ("right", "refused", "STRAY", "original fails", "not built")
    counts = [sum(row["result"] == kind for row in classes) for kind in kinds]
    header = [
        "classes",
        "right",
        "refused by name",
        "stray",
        "original does not run on ids alone",
        "not built so small",
    ]
    reasons = [row["reason"] for row in classes if row["result"] == "refused"]
    common = [
        ("encoder-decoder", "an encoder-decoder"),
        ("of the KV cache itself", "the layer works on the KV cache itself (convolutions, linear attention)"),
        ("has no list of", "no list of decoder layers"),
    ]
    lines = [[text, sum(part in reason for reason in reasons)] for part, text in common]
    lines.append(["another", sum(not any(part in reason for part, _ in common) for reason in reasons)])
    return f"""## Every model class of transformers

`python reliability/model_classes.py`: every causal and image-text class of transformers
{found["versions"]["transformers"]}, from its own configuration with small sizes. Right: `explain` and `transform`
agree, logits at ratio 0 are those of the untransformed model bit for bit, and again after `restore`. Refused: both
end in a pp_fx error, and the model is as it was. Stray: anything else.

{rows(header, [[len(classes), *counts]])}
{rows(["refused because", "classes"], lines)}"""


def upstream(found: dict[str, Any]) -> str:
    lines = []
    for mode, label in (("zero", "ratio 0"), ("pruned", "MLP 40%, heads 50%")):
        row = found[mode]
        lines.append([label, row["run"], row["passed"], len(row["refused"]), len(row["differ"])])
    names = sorted({name.split("::")[-1].split("[")[0] for name in found["pruned"]["differ"]})
    zero = sorted({name.split("::")[-1].split("[")[0] for name in found["zero"]["differ"]})
    told = f"Differing at ratio 0: {', '.join(zero) or 'none'}. Pruned: {', '.join(names) or 'none'}."
    return f"""## transformers' own tests

`python reliability/upstream.py`: `tests/models/*/test_modeling_*.py` of transformers {found["transformers"]}
({", ".join(found["models"])}; {found["stock"]} tests, generation included), in which every causal model is transformed
as it is built. Counted are those that transform a model and pass on the original.

{rows(["", "tests", "passed", "refused by name", "differ"], lines)}
{told} A pruned model makes one selection for a batch, so tests that compare a batch with its samples one by one cannot
hold."""


def main() -> None:
    sections = [_HEAD, _PROMISES]
    for section in (campaign, model_classes, upstream, soak, artifacts, sanitize, mutations, versions):
        found = read(section.__name__)
        if found is not None:
            sections.append(section(found))
    sections.append(_FOUND)
    PAGE.write_text("\n".join(section.strip() + "\n" for section in sections), encoding="utf-8")


if __name__ == "__main__":
    main()
