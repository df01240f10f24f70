"""Compact weights: packed and in rows, compiled and not, against torch's own product."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pp_fx.kernels import packed_linear
from pp_fx.kernels.packed_linear import PACKED_DTYPES
from pp_fx.runtime.compact import CompactLinear, compact_linear, make_compact, rows_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
packs = pytest.mark.skipif(torch.float32 not in PACKED_DTYPES, reason="no oneDNN")


def layer(dtype=torch.float32, out=24, width=40, biased=False):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, generator=generator).to(dtype)
    return weight, torch.randn(out, generator=generator).to(dtype) if biased else None


def assert_product(got, x, weight, bias):
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 4 * torch.finfo(x.dtype).eps * expected.abs().max()
    assert got.dtype == x.dtype
    assert (got.double() - expected).abs().max() <= tolerance


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 3), (5, 1), (3, 31)]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(1, 70),
    st.integers(1, 70),
)
def test_products_are_those_of_torch(shape, dtype, biased, out, width):
    weight, bias = layer(dtype, out, width, biased)
    x = torch.randn(*shape, width).to(dtype)
    assert_product(compact_linear(x, make_compact(weight, bias)), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_store_and_read(dtype, rows, backend):
    weight, bias = layer(dtype, biased=True)
    x = torch.randn(rows, 1, 40).to(dtype)
    held = []

    def step(x):
        if not held:
            held.append(make_compact(weight + 0, bias))
        return compact_linear(x, held[0])

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=False)
    for _ in range(3):
        assert_product(compiled(x), x, weight, bias)
    assert held[0].packed == (dtype in PACKED_DTYPES)
    torch._dynamo.reset()


def test_the_input_may_be_a_view():
    weight, _ = layer(torch.bfloat16)
    x, linear = torch.randn(1, 1, 120, dtype=torch.bfloat16), make_compact(weight, None)
    for run in (compact_linear, torch.compile(compact_linear, backend="aot_eager")):
        assert_product(run(x.split(40, -1)[1], linear), x[..., 40:80], weight, None)
    torch._dynamo.reset()


def test_a_batch_size_left_open_stays_open():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    linear = make_compact(*layer(torch.bfloat16))
    compiled = torch.compile(compact_linear, backend=backend, fullgraph=True)
    for rows in (3, 4, 7, 2):
        x = torch.randn(rows, 1, 40, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x, linear)
    torch._dynamo.reset()
    assert len(graphs) == 1


@packs
def test_packed_is_opaque_and_comes_back(monkeypatch):
    weight, bias = layer()
    packed = make_compact(weight.t().contiguous().t(), bias)
    assert packed.packed
    assert packed.weight.layout == torch._mkldnn
    assert torch.equal(rows_of(packed), weight)
    monkeypatch.setattr(packed_linear, "PACKED_DTYPES", frozenset())
    rows = make_compact(weight.t().contiguous().t(), bias)
    assert torch.equal(rows_of(rows), weight)
    assert not rows.packed


@packs
def test_gradients_pass_through_a_packed_weight():
    weight, _ = layer()
    x = torch.randn(2, 1, 40, requires_grad=True)
    compact_linear(x, make_compact(weight, None)).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 1, 40))
    weight.requires_grad_()
    assert make_compact(weight, None) == CompactLinear(weight, None)
    with torch.no_grad():
        assert make_compact(weight, None).packed


@packs
def test_autocast_keeps_its_dtype():
    linear, x = make_compact(*layer()), torch.randn(2, 1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert compact_linear(x, linear).dtype == torch.bfloat16
        assert not make_compact(*layer()).packed
