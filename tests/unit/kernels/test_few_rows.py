"""The probe's products: the native kernel against float64, and torch's own product wherever it is not meant."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pp_fx.kernels.few_rows import MOST_ROWS, few_rows


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, MOST_ROWS + 3),
    features=st.integers(1, 40),
    width=st.sampled_from([1, 15, 31, 32, 33, 63, 64, 100, 128, 257, 600]),
    biased=st.booleans(),
    apart=st.booleans(),
    seed=st.integers(0, 999),
)
def test_near_the_exact_product(rows, features, width, biased, apart, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, width).bfloat16(), torch.randn(features, width + 5).bfloat16()
    weight = weight[:, :width] if apart else weight[:, :width].contiguous()
    bias = torch.randn(features).bfloat16() if biased else None
    right = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = few_rows(x[None], weight, bias)
    assert found.shape == (1, rows, features)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[0].double(), right, atol=2e-2 * width**0.5, rtol=1e-2)


def test_infinite_and_undefined_numbers_reach_their_own_rows_alone():
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(9, 64).bfloat16()
    x[1, 3], x[2, 4] = torch.inf, torch.nan
    finite = few_rows(x, weight).isfinite().all(1)
    assert finite.tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("case", ["float32", "grad", "autocast"])
def test_torchs_own_product_elsewhere(case, monkeypatch):
    monkeypatch.setattr(sys.modules[few_rows.__module__], "native", lambda: pytest.fail("the native kernel was asked"))
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    x, weight = torch.randn(2, 3, 16).to(dtype), torch.randn(5, 16).to(dtype).requires_grad_(case == "grad")
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        found = few_rows(x, weight)
        assert torch.equal(found, F.linear(x, weight))
    assert found.requires_grad == (case == "grad")


def test_the_operator_is_registered_as_compilers_need_it():
    x, weight = torch.randn(4, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    torch.library.opcheck(torch.ops.pp_fx.few_rows, (x, weight, torch.randn(6).bfloat16()))
