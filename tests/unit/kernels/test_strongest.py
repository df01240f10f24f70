"""The MLP over each token's strongest channels: the native kernels and torch's products against loops in float64."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pp_fx.errors import BuildError
from pp_fx.kernels import native_kernels, strongest
from pp_fx.native_library import NativeLibrary

TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="the native kernels need a C++ compiler"
)


def oracle(strength, factor, x, up, up_bias, down, down_bias, count):
    """Token by token, channel by channel, in float64."""
    out = torch.zeros(len(x), down.shape[1], dtype=torch.float64)
    for t in range(len(x)):
        least = sorted(strength[t].tolist(), reverse=True)[count - 1]
        for c in range(strength.shape[1]):
            if strength[t, c] < least:
                continue
            z = factor[t, c].double()
            if up is not None:
                z = z * ((x[t].double() @ up[c].double()) + (0 if up_bias is None else up_bias[c].double()))
            out[t] += z * down[c].double()
    return out if down_bias is None else out + down_bias.double()


@st.composite
def calls(draw, most=6):
    tokens, channels = draw(st.integers(1, most)), draw(st.integers(1, 70))
    hidden, out = draw(st.sampled_from([1, 3, 15, 16, 17, 31, 33, 64, 65, 130])), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    gated, biases = draw(st.booleans()), draw(st.booleans())
    factor, x = random(tokens, channels), random(tokens, hidden) / hidden**0.5
    strength = factor.float().abs()
    if draw(st.booleans()):  # many equal ones, zeros among them
        strength = strength.round()
        factor = torch.where(strength == 0, 0, factor)
    rows = random(channels, 2 * hidden)[:, ::1][:, :hidden] if draw(st.booleans()) else random(channels, hidden)
    return (
        strength,
        factor,
        x,
        rows if gated else None,
        random(channels) if gated and biases else None,
        random(channels, out) / channels**0.5,
        random(out) if biases else None,
        draw(st.integers(1, channels)),
    )


@needs_compiler
@settings(max_examples=200, deadline=None)
@given(calls(), st.integers(1, 3))
def test_the_native_kernel_is_the_sum_over_the_chosen_channels(call, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert native_kernels.native() is not None
        found = strongest.strongest(*call)
    finally:
        torch.set_num_threads(before)
    dtype = call[1].dtype
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), oracle(*call), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=50, deadline=None)
@given(calls())
def test_torchs_products_masked_are_the_same_sum(call):
    found = strongest.plain_strongest(*call)
    dtype = call[1].dtype
    torch.testing.assert_close(found.double(), oracle(*call), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@needs_compiler
@settings(max_examples=50, deadline=None)
@given(calls())
def test_the_native_linear_layer(call):
    _, factor, x, up, bias, *_ = call
    up = torch.randn(factor.shape[1], x.shape[1]).to(x.dtype) if up is None else up
    right = torch.nn.functional.linear(x.double(), up.double(), None if bias is None else bias.double())
    found = strongest.linear_rows(x, up, bias)
    torch.testing.assert_close(found.double(), right, atol=TOLERANCE[x.dtype], rtol=TOLERANCE[x.dtype])


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(calls())
def test_a_linear_layer_of_the_chosen_channels_alone(call):
    strength, factor, x, up, bias, *_, count = call
    up = torch.randn(factor.shape[1], x.shape[1]).to(x.dtype) if up is None else up
    whole = torch.nn.functional.linear(x.double(), up.double(), None if bias is None else bias.double())
    chosen = (strength >= strength.topk(count, -1).values[:, -1:]) & (strength > 0)
    found = strongest.chosen_rows(strength, x, up, bias, count)
    right = torch.where(chosen, whole, 0.0)
    torch.testing.assert_close(found.double(), right, atol=TOLERANCE[x.dtype], rtol=TOLERANCE[x.dtype])


@st.composite
def rounded(draw, inputs, features, dtype, grouped):
    """A weight [features, inputs] of int8 numbers, in float64, and as the kernels take it: numbers, scales, zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    group = draw(st.sampled_from([g for g in (1, 3, 8, 16, 32, 40, inputs) if inputs % g == 0])) if grouped else inputs
    shape = (features, inputs // group)
    numbers = torch.randint(-8, 8, (features, inputs), generator=generator, dtype=torch.int8)
    scales = ((1 + torch.rand(shape, generator=generator)) / 8 / inputs**0.5).to(dtype if grouped else torch.float32)
    most = draw(st.sampled_from([0, 8])) if grouped else 0  # weights without zero points take a path of their own
    zeros = torch.randint(-most, most + 1, shape, generator=generator, dtype=torch.int8)
    spread_scales, spread_zeros = (part.double().repeat_interleave(group, 1) for part in (scales, zeros))
    exact = (numbers.double() - spread_zeros) * spread_scales
    return exact, (numbers, scales, zeros) if grouped else (numbers, scales.flatten(), None)


@st.composite
def rounded_calls(draw):
    dtype, grouped, biases = draw(st.sampled_from(list(TOLERANCE))), draw(st.booleans()), draw(st.booleans())
    tokens, channels = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 24, 32, 80]))
    hidden, out = draw(st.sampled_from([1, 8, 15, 32, 48, 120])), draw(st.integers(1, 70))
    up, down = draw(rounded(hidden, channels, dtype, grouped)), draw(rounded(channels, out, dtype, grouped))
    x, factor = (torch.randn(tokens, width).to(dtype) for width in (hidden, channels))
    bias = torch.randn(channels).to(dtype) if biases else None
    return factor.float().abs(), factor, x, up, bias, down, draw(st.integers(1, channels))


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(rounded_calls(), st.booleans())
def test_weights_of_int8_numbers(call, native):
    """With a scale for each row, or a scale and a zero for each group of it: both ways to compute against float64."""
    strength, factor, x, (up, up_parts), bias, (down, down_parts), count = call
    close = {"atol": TOLERANCE[x.dtype], "rtol": TOLERANCE[x.dtype]}
    sides = (strongest._native_linear, strongest._native_chosen, strongest._native_strongest)
    linear, chosen, summed = (
        sides if native else (strongest._plain_linear, strongest._plain_chosen, strongest.plain_strongest)
    )
    rows, *scaling = up_parts
    whole = torch.nn.functional.linear(x.double(), up, None if bias is None else bias.double())
    torch.testing.assert_close(linear(x, rows, bias, *scaling).double(), whole, **close)
    kept = (strength >= strength.topk(count, -1).values[:, -1:]) & (strength > 0)
    torch.testing.assert_close(
        chosen(strength, x, rows, bias, count, *scaling).double(), torch.where(kept, whole, 0.0), **close
    )
    numbers, scales, zeros = (part if part is None or part.ndim == 1 else part.t().contiguous() for part in down_parts)
    for gate, gate_bias, (gate_rows, gate_scales, gate_zeros) in ((up, bias, up_parts), (None, None, (None,) * 3)):
        found = summed(
            strength, factor, x, gate_rows, gate_bias, numbers, None, count, gate_scales, scales, gate_zeros, zeros
        )
        right = oracle(strength, factor, x, gate, gate_bias, down.t(), None, count)
        torch.testing.assert_close(found.double(), right, **close)


@needs_compiler
def test_a_token_that_has_gone_wrong_leaves_the_others_alone():
    call = list(_plain_call(3))
    alone = strongest.strongest(*call)
    for broken in (float("nan"), float("inf")):
        for index in (0, 1, 2):
            call[index] = call[index].clone()
            call[index][1] = broken
        found = strongest.strongest(*call)
        torch.testing.assert_close(found[[0, 2]], alone[[0, 2]])


def _plain_call(tokens):
    torch.manual_seed(0)
    factor, x = torch.randn(tokens, 40), torch.randn(tokens, 24)
    return factor.abs(), factor, x, torch.randn(40, 24), None, torch.randn(40, 24), None, 16


@pytest.mark.parametrize("name", ["linear_rows", "chosen_rows", "strongest"])
def test_the_operators_tell_compilers_the_truth(name):
    call = _plain_call(2)
    args = {
        "linear_rows": (call[2], call[3], None),
        "chosen_rows": (call[0], call[2], call[3], None, 16),
        "strongest": call,
    }[name]
    torch.library.opcheck(getattr(torch.ops.pp_fx, name).default, args, test_utils=["test_schema", "test_faketensor"])


def test_who_serves_a_call():
    weight = torch.zeros(3, 4)
    assert strongest.serves(weight, 1)
    assert not strongest.serves(weight, strongest.MOST_TOKENS + 1)
    assert not strongest.serves(weight.double(), 1)
    assert not strongest.serves(weight.clone().requires_grad_(), 1)
    with torch.no_grad():
        assert strongest.serves(weight.clone().requires_grad_(), 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not strongest.serves(weight, 1)


@needs_compiler
def test_a_library_is_built_once_and_known_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PP_FX_CACHE", str(tmp_path))
    assert native_kernels.LIBRARY.find() is None
    built = native_kernels.LIBRARY.build()
    assert native_kernels.LIBRARY.find() == built
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    with pytest.raises(BuildError, match="is no library of pp_fx operators"):
        native_kernels.LIBRARY.check(other)
    monkeypatch.setattr("pp_fx.native_library._processor", lambda: "another one")
    assert native_kernels.LIBRARY.find() is None, "another processor has a library of its own"
    broken = NativeLibrary("pp_fx_kernels", tmp_path / "src" / "broken.cpp")
    broken.main.parent.mkdir()
    broken.main.write_text("no C++")
    with pytest.raises(BuildError, match="cannot build pp_fx_kernels"):
        broken.build()


def test_without_a_compiler_torch_computes_the_same_and_says_so(tmp_path):
    code = (
        "import os, warnings, torch\n"
        "from pp_fx.kernels import strongest\n"
        "torch.manual_seed(0)\n"
        "f, x = torch.randn(2, 40), torch.randn(2, 24)\n"
        "call = (f.abs(), f, x, torch.randn(40, 24), None, torch.randn(40, 24), None, 16)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    found = [strongest.strongest(*call) for _ in range(2)]\n"
        "assert len(seen) == 1 and 'no C++ compiler was found' in str(seen[0].message), seen\n"
        "assert torch.equal(found[0], strongest.plain_strongest(*call))\n"
    )
    environment = {"PP_FX_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def like_the_oracle(strongest, call, move):
    """Of equal strengths one token takes the first ones, as many as asked for: the oracle is told which."""
    strength, factor, *_, count = call
    found = strongest(*(move(part) if isinstance(part, torch.Tensor) else part for part in call)).cpu()
    if len(strength) == 1:
        order = strength[0].sort(descending=True, stable=True).indices
        strength = torch.zeros_like(strength).index_fill_(1, order[:count], 1.0)
    dtype = factor.dtype
    assert found.dtype == dtype
    expected = oracle(strength, *call[1:])
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.gpu
@settings(max_examples=30, deadline=None)
@given(calls(most=2))
def test_the_triton_kernels_on_a_gpu(call):
    like_the_oracle(strongest.strongest, call, torch.Tensor.cuda)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_triton_kernels_in_the_interpreter():
    """In a process of its own: Triton decides at import whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.unit.kernels.test_strongest"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@settings(max_examples=30, deadline=None, derandomize=True)
@given(calls(most=2))
def _interpreted(call):
    from pp_fx.kernels import triton_strongest

    # several of each
    triton_strongest._FEATURES, triton_strongest._SLICE, triton_strongest._COLUMNS = 32, 16, 32
    like_the_oracle(triton_strongest.strongest, call, torch.Tensor.clone)


if __name__ == "__main__":
    _interpreted()
