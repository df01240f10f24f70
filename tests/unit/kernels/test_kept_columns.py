"""Kept columns by the native kernel: exactly torch's, for every dtype, order and layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pp_fx.kernels import kept_columns as module
from pp_fx.kernels.kept_columns import copy_columns, kept_columns

DTYPES = (torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def calls(draw):
    """A weight with room behind its rows, and columns: ascending, in any order, some twice, all or none."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    kept = draw(st.lists(st.integers(0, columns - 1), max_size=columns))
    if draw(st.booleans()):
        kept = sorted(set(kept))
    if draw(st.integers(0, 5)) == 0:
        kept = list(range(columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    weight = torch.randint(-99, 99, (rows, columns + draw(st.integers(0, 9))), generator=generator)
    weight = weight[:, :columns].to(draw(st.sampled_from(DTYPES)))
    return (weight if draw(st.booleans()) else weight.t().contiguous().t()), torch.tensor(kept, dtype=torch.int64)


@settings(max_examples=150, deadline=None)
@given(calls())
def test_the_columns_of_the_weight(call):
    weight, kept = call
    right = weight[:, kept]
    assert torch.equal(kept_columns(weight, kept), right)
    room = torch.full((right.numel() + 8,), 77, dtype=weight.dtype)
    copied = copy_columns(weight, kept, room[: right.numel()].view(right.shape))
    assert torch.equal(copied, right)
    assert bool((room[right.numel() :] == 77).all()), "written behind the result"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_by_several_threads(threads):
    weight, kept = torch.randn(100, 300).bfloat16(), torch.arange(0, 300, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(kept_columns(weight, kept), weight[:, kept])
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(module, "native", lambda: None)
    weight, kept = torch.randn(5, 9), torch.tensor([1, 4, 8])
    assert torch.equal(kept_columns(weight, kept), weight[:, kept])


def test_the_operator_is_registered_as_compilers_need_it():
    torch.library.opcheck(torch.ops.pp_fx.kept_columns, (torch.randn(4, 8), torch.tensor([1, 2, 7])))
