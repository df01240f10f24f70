"""Copies of linear layers in 8 and 4 bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pp_fx.kernels.coded import GROUP, coded_rows, decode, encode, rounded


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 200), st.integers(0, 999))
def test_a_copy_is_near_its_weight(bits, rows, width, seed):
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    coded = encode(weight, bits)
    groups = -(-width // GROUP)
    assert coded.codes.shape == (rows, groups * GROUP * bits // 8)
    assert coded.scales.shape == (rows, groups)
    near = decode(coded)
    assert not near[:, width:].any()
    # half a step, and what rounding the scale to bf16 adds to the largest code
    step = coded.scales.float().repeat_interleave(GROUP, 1)[:, :width]
    assert bool(((near[:, :width] - weight).abs() <= step * (0.5 + 2.0 ** (bits - 9)) + 1e-6).all())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 200), st.integers(0, 999))
def test_the_kernel_multiplies_with_the_copy(bits, dtype, tokens, rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    coded = encode(torch.randn(rows, width, generator=generator), bits)
    near = rounded(x)
    step = x.float().abs().max() / 127
    assert bool(((near - x.float()).abs() <= step / 2 + 1e-6).all())
    right = near.double() @ decode(coded)[:, :width].double().t()
    found = coded_rows(x, coded)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), right, atol=1e-4, rtol=1e-4)


def test_the_operator_tells_compilers_the_truth():
    args = (torch.randn(2, 70), *encode(torch.randn(5, 70), 4))
    torch.library.opcheck(torch.ops.pp_fx.coded_rows.default, args, test_utils=["test_schema", "test_faketensor"])
