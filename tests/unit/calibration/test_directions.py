"""The sketch against a full eigendecomposition."""

import pytest
import torch

from pp_fx.calibration.directions import Directions


def stream(batches=4, rows=300, channels=40, rank=6):
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(rank, channels, generator=g) * torch.linspace(4, 1, rank)[:, None]
    scale = torch.logspace(-2, 2, channels)  # channels of very different loudness
    return [
        (torch.randn(rows, rank, generator=g) @ mix + torch.randn(rows, channels, generator=g) + i) * scale
        for i in range(batches)
    ]


@pytest.mark.parametrize("masked", [False, True])
def test_directions_match_the_eigenvectors_of_the_correlation(masked):
    sketch, kept = Directions(6), []
    for rows in stream():
        real = torch.arange(len(rows)) % 3 != 0 if masked else None
        dirty = rows if real is None else torch.where(real[:, None], rows, torch.nan)
        sketch.add(dirty, real)
        kept.append(rows if real is None else rows[real])
    rows = torch.cat(kept).double()
    rows = rows - rows.mean(0)
    covariance = rows.T @ rows / len(rows)
    deviation = covariance.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(covariance / deviation / deviation[:, None])
    best = (vectors[:, -6:] * values[-6:]) @ vectors[:, -6:].T
    found = sketch.directions().double() / deviation
    assert found.shape == (6, 40)
    assert (found.T @ found - best).norm() < 0.1 * best.norm()  # between batches 12 directions survive, not all
    assert 0.98 * values[-6:].sum() < found.square().sum() < 1.001 * values[-6:].sum()


def test_nothing_seen_gives_no_directions():
    sketch = Directions(4)
    sketch.add(torch.zeros(3, 8), torch.zeros(3, dtype=torch.bool))
    assert sketch.directions() is None


def test_memory_does_not_grow_with_the_stream():
    sketch = Directions(6)
    for rows in stream(batches=8, rows=3000):
        sketch.add(rows, None)
    assert sketch.factor.shape[0] <= 12
