"""A history by shards: taken of the whole, put together, and taken again."""

import pytest
import torch

from pp_fx.calibration.history_shards import shard_of, whole_of


def history(columns, units, directions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(directions, columns, generator=generator)
    return {
        "energy": torch.rand(columns, generator=generator) + 9.0,
        "mean": torch.randn(columns, generator=generator),
        "directions": rows.to(torch.bfloat16),
        "gram": torch.randn(units, units, generator=generator),
        "seen": torch.tensor(1.0),
    }


def covariance(directions):
    return directions.float().t() @ directions.float()


def test_one_process_keeps_what_it_has():
    whole = history(24, 4, 5)
    assert shard_of(whole, 1, 0, 1, 5) is whole


@pytest.mark.parametrize("count", [2, 4])
def test_what_shards_wrote_comes_back_bit_for_bit(count):
    parts = [history(12, 2, 5, seed) for seed in range(count)]
    whole = whole_of(parts)
    assert whole["energy"].shape == (12 * count,)
    assert whole["gram"].shape == (2 * count, 2 * count)
    for rank, part in enumerate(parts):
        found = shard_of(whole, count, rank, count, 5)
        assert found.keys() == part.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in part.items())


def test_a_shard_of_the_whole():
    whole = history(24, 4, 5)
    found = shard_of(whole, 1, 1, 2, 5)
    assert torch.equal(found["mean"], whole["mean"][12:])
    assert torch.equal(found["gram"], whole["gram"][2:, 2:])
    assert torch.equal(found["directions"], whole["directions"][:, 12:])
    positions = {**whole, "energy": torch.rand(7, 24)}
    assert torch.equal(shard_of(positions, 1, 1, 2, 5)["energy"], positions["energy"][:, 12:])


def test_shards_on_one_device_have_nothing_between_them():
    parts = [history(12, 2, 5, seed) for seed in range(2)]
    found = shard_of(whole_of(parts), 2, 0, 1, 10)  # room for all
    expected = torch.block_diag(*(covariance(part["directions"]) for part in parts))
    torch.testing.assert_close(covariance(found["directions"]), expected, rtol=1e-5, atol=1e-5)
    assert not found["gram"][:2, 2:].any()
    few = shard_of(whole_of(parts), 2, 0, 1, 8)["directions"]
    assert few.shape == (8, 24)
    assert few.dtype == torch.bfloat16
    assert (covariance(few) - expected).norm() < 0.5 * expected.norm()


def test_more_and_fewer_shards_than_wrote():
    parts = [history(12, 2, 5, seed) for seed in range(2)]
    whole = whole_of(parts)
    quarter = shard_of(whole, 2, 3, 4, 5)["directions"]
    assert torch.equal(quarter, parts[1]["directions"][:, 6:])
    narrow = shard_of(whole, 2, 0, 12, 2)["directions"]  # two channels, at most two directions
    torch.testing.assert_close(covariance(narrow), covariance(parts[0]["directions"][:, :2]), rtol=0.02, atol=0.02)


def test_before_calibration_and_what_does_not_divide():
    whole = history(24, 4, 5)
    whole["directions"] = torch.zeros_like(whole["directions"])
    assert not shard_of(whole, 1, 0, 2, 5)["directions"].any()
    assert shard_of(whole, 1, 0, 5, 5)["energy"] is whole["energy"]
