"""Two processes on gloo: the history and the numbers of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pp_fx
from pp_fx.calibration.directions import Directions
from pp_fx.calibration.padding import add_padded
from pp_fx.evaluate import evaluate
from pp_fx.ranks import of_all, world
from pp_fx.runtime.state import states_of
from tests.helpers.command import run
from tests.helpers.models import tiny_llama

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "default": pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, compensation_rank=96),
    "paper": pp_fx.ProbePruningConfig.paper(0.4, skip_layers=1, round_to=1),
}


def batches(rank, ranks):
    """Batches of several lengths, some padded."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (30, 40, 17, 40):
        ids = torch.randint(2, 97, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made[rank::ranks]


def work(name):
    """Calibrate and evaluate on this rank's share; the history and the numbers."""
    rank, ranks = world()
    model = pp_fx.transform(tiny_llama(), CONFIGS[name])
    pp_fx.calibrate(model, batches(rank, ranks), progress=False)
    text = torch.randint(2, 97, (5, 40), generator=torch.Generator().manual_seed(1))
    with pp_fx.history_frozen(model):
        found = evaluate(model, text, 2)
    history = [[s.energy, s.mean, s.gram, s.directions] for s in states_of(model) if s.prunes]
    return found.per_sequence, history


def torchrun(*command, processes=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "paper")) for n in CONFIGS])
def test_two_processes_end_with_the_history_and_numbers_of_one(name, tmp_path):
    torchrun("-m", "tests.system.test_distributed", name, tmp_path)
    losses, history = work(name)
    for rank in range(2):
        found, merged = torch.load(tmp_path / str(rank))
        for ours, theirs in zip(merged, history, strict=True):
            for mine, other in zip(ours[:3], theirs[:3], strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)  # sums of the same numbers
            if theirs[3] is not None:  # directions in bf16, of a rank that truncates nothing
                mine, other = (d.float().t() @ d.float() for d in (ours[3], theirs[3]))
                assert (mine - other).norm() < 1e-2 * other.norm()
        assert found.shape == losses.shape
        assert torch.equal(found, torch.load(tmp_path / "0")[0]), "all ranks have the numbers of the whole text"
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)


def test_the_command_line_under_torchrun(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 3000)
    options = ["--text", text, "--length", "32", "--sequences", "6", "--batch", "2", "--dtype", "float32"]
    one = run("eval", folder, *map(str, options), "--mlp-ratio", "0.3", "--json", "-")
    done = torchrun("-m", "pp_fx.cli", "eval", folder, *options, "--mlp-ratio", "0.3", "--json", tmp_path / "out.json")
    two = json.loads((tmp_path / "out.json").read_text())
    assert two["dense"]["nll"] == pytest.approx(json.loads(one.stdout)["dense"]["nll"], rel=1e-6)
    assert done.stdout.count("block MACs") == 1, "one rank reports"


def test_one_process_is_a_world_of_its_own():
    assert world() == (0, 1)
    assert of_all("x") == ["x"]


def test_sums_of_unequal_lengths():
    assert add_padded(torch.tensor([1.0, 2.0]), torch.tensor([10.0])).tolist() == [11, 2]
    assert add_padded(torch.tensor([10.0]), torch.tensor([1.0, 2.0])).tolist() == [11, 2]


def test_merged_sketches_hold_the_covariance_of_all_rows():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(200, 6, generator=generator) * torch.arange(1, 7) + shift for shift in (0.0, 3.0)]
    one, other = Directions(6), Directions(6)
    one.add(rows[0], None)
    other.add(rows[1], None)
    one.merge(other.parts(), torch.device("cpu"))
    one.merge(None, torch.device("cpu"))
    found = one.directions()
    both = torch.cat(rows)
    torch.testing.assert_close(found.t() @ found, both.t().cov(correction=0), rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    from pp_fx.ranks import processes

    torch.set_num_threads(1)
    with processes() as here:
        torch.save(work(sys.argv[1]), Path(sys.argv[2]) / str(here))
