"""Compact weights: the layouts, and the product of one row in compiled calls against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from pp_fx.compact import compact_linear, store_inputs, store_output


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 1), (1, 3), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_compiled_products_are_those_of_torch(shape, dtype, biased):
    generator = torch.Generator().manual_seed(0)
    weight = store_inputs(torch.randn(24, 40, generator=generator).to(dtype))
    bias = torch.randn(24, generator=generator).to(dtype) if biased else None
    x = torch.randn(*shape, 40, generator=generator).to(dtype)
    compiled = torch.compile(compact_linear, fullgraph=True, backend="aot_eager", dynamic=False)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max()
    for linear in (compact_linear, compiled):
        assert (linear(x, (weight, bias)).double() - expected).abs().max() < tolerance
    torch._dynamo.reset()


def test_one_row_may_be_a_view():
    x, weight = torch.randn(1, 1, 120, dtype=torch.bfloat16), torch.randn(24, 40, dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: compact_linear(x.split(40, -1)[1], (weight, None)), backend="aot_eager")
    expected = F.linear(x[..., 40:80].double(), weight.double())
    torch.testing.assert_close(compiled(x).double(), expected, atol=0.1, rtol=0.02)
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_is_summed_without_the_library(rows):
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    x, weight = torch.randn(rows, 1, 40, dtype=torch.bfloat16), torch.randn(24, 40, dtype=torch.bfloat16)
    torch.compile(compact_linear, backend=backend, dynamic=False)(x, (weight, None))
    torch._dynamo.reset()
    assert (torch.as_strided in seen, "sum" in seen, F.linear in seen) == (rows == 1, rows == 1, rows > 1)


def test_a_batch_size_left_open_stays_open():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    weight = torch.randn(24, 40, dtype=torch.bfloat16)
    compiled = torch.compile(compact_linear, backend=backend, fullgraph=True)
    for rows in (3, 4, 7, 2):
        x = torch.randn(rows, 1, 40, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x, (weight, None))
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_layouts():
    weight = torch.randn(24, 40)
    assert torch.equal(store_inputs(weight), weight)
    assert store_inputs(weight).t().is_contiguous()
    half = weight.bfloat16()
    assert store_inputs(half) is half
    stored = store_output(weight)
    assert stored.is_contiguous()
    assert torch.equal(stored, weight.t())
