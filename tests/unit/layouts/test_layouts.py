"""Rows and columns of quantized weights: what the library that quantized them makes of a part, against the whole."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pp_fx import layouts
from pp_fx.errors import UnsupportedModelError
from tests.helpers.models import tiny_llama
from tests.helpers.quantized import QUANTIZATIONS, quantize_

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@st.composite
def weights(draw):
    name = draw(st.sampled_from(list(QUANTIZATIONS)))
    out, width = draw(st.integers(1, 40)), 16 * draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(list(DTYPES)))
    torch.manual_seed(draw(st.integers(0, 999)))
    linear = nn.Sequential(nn.Linear(width, out, bias=False).to(dtype))
    quantize_(linear, QUANTIZATIONS[name]())
    return linear[0].weight.detach()


def some(count, draw, least=1):
    return torch.tensor(sorted(draw(st.sets(st.integers(0, count - 1), min_size=least))))


@settings(max_examples=80, deadline=None)
@given(weights(), st.data())
def test_rows_give_what_the_whole_gives_there(weight, data):
    index, x = some(weight.shape[0], data.draw), torch.randn(3, weight.shape[1], dtype=weight.dtype)
    taken = layouts.take_rows(weight, index)
    assert type(taken) is type(weight)
    assert taken.shape == (len(index), weight.shape[1])
    close = {"rtol": DTYPES[weight.dtype], "atol": DTYPES[weight.dtype]}
    torch.testing.assert_close(F.linear(x, taken), F.linear(x, weight)[:, index], **close)
    assert torch.equal(layouts.widened(taken), layouts.widened(weight)[index])


@settings(max_examples=40, deadline=None)
@given(weights(), st.data(), st.booleans())
def test_a_range_of_rows(weight, data, inference):
    start, step = data.draw(st.integers(0, weight.shape[0] - 1)), data.draw(st.integers(1, 3))
    rows = (start, data.draw(st.integers(start + 1, weight.shape[0])), step)
    with torch.inference_mode(inference):
        taken = layouts.row_range(weight, rows)
        assert type(taken) is type(weight)
        assert torch.equal(layouts.widened(taken), layouts.widened(weight)[slice(*rows)])


@settings(max_examples=40, deadline=None)
@given(weights(), st.data())
def test_columns_that_lie_in_memory(weight, data):
    """The same numbers, and the same columns of them."""
    turned, index = layouts.by_columns(weight), some(weight.shape[1], data.draw)
    assert torch.equal(layouts.widened(turned), layouts.widened(weight))
    taken, wanted = layouts.take_columns(turned, index), layouts.take_columns(weight, index)
    assert torch.equal(layouts.widened(taken), layouts.widened(wanted))


@settings(max_examples=40, deadline=None)
@given(weights())
def test_products_that_do_not_round_activations(weight):
    x = torch.randn(3, weight.shape[1], dtype=weight.dtype)
    close = {"rtol": DTYPES[weight.dtype], "atol": DTYPES[weight.dtype]}
    torch.testing.assert_close(F.linear(x, layouts.unrounded(weight)), F.linear(x, layouts.widened(weight)), **close)


@settings(max_examples=80, deadline=None)
@given(weights(), st.data())
def test_columns_give_what_the_whole_gives_of_zeros_elsewhere(weight, data):
    index = some(weight.shape[1], data.draw, least=2)  # of one column torchao cannot round the activations
    x = torch.randn(3, len(index), dtype=weight.dtype)
    taken = layouts.take_columns(weight, index)
    assert taken.shape == (weight.shape[0], len(index))
    spread = torch.zeros(3, weight.shape[1], dtype=weight.dtype).index_copy(1, index, x)
    close = {"rtol": DTYPES[weight.dtype], "atol": DTYPES[weight.dtype]}
    torch.testing.assert_close(F.linear(x, taken), F.linear(spread, weight), **close)


@settings(max_examples=40, deadline=None)
@given(weights())
def test_codes_are_the_weight(weight):
    codes = layouts.codes_of(weight)
    assert (codes is None) == (type(weight).__name__ == "Float8Tensor")
    if codes is not None:
        assert codes.numbers.dtype == torch.int8
        assert codes.scales.dtype == (torch.float32 if codes.zeros is None else weight.dtype)
        turned = codes.transposed()
        assert turned.numbers.is_contiguous()
        whole = layouts.widened(weight).float()
        close = {"rtol": 1e-2, "atol": 1e-5} if weight.dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 0}
        torch.testing.assert_close(_numbers(codes, 1), whole, **close)
        torch.testing.assert_close(_numbers(turned, 0).t(), whole, **close)


def _numbers(codes, inputs):
    """A weight out of its codes; input features are its dimension `inputs`."""
    if codes.zeros is None:
        return codes.numbers.float() * codes.scales.unsqueeze(inputs)
    group = codes.numbers.shape[inputs] // codes.zeros.shape[inputs]
    zeros, scales = (part.float().repeat_interleave(group, inputs) for part in (codes.zeros, codes.scales))
    return (codes.numbers.float() - zeros) * scales


def test_an_ordinary_tensor_has_no_layout():
    weight = nn.Parameter(torch.randn(3, 4))
    assert layouts.is_plain(weight)
    assert layouts.widened(weight) is weight
    assert layouts.codes_of(weight) is None
    assert layouts.stored_bytes(weight) == 48


@pytest.mark.parametrize("name", list(QUANTIZATIONS))
def test_bytes_are_those_of_the_parts(name):
    linear = nn.Sequential(nn.Linear(32, 8, bias=False).bfloat16())
    quantize_(linear, QUANTIZATIONS[name]())
    weight = linear[0].weight
    parts = [getattr(weight, part) for part in weight.__tensor_flatten__()[0]]
    assert layouts.stored_bytes(weight) == sum(p.numel() * p.element_size() for p in parts) < 2 * 32 * 8 + 8 * 8


def _refused(quantize):
    import pp_fx

    model = tiny_llama()
    quantize(model)
    with pytest.raises(UnsupportedModelError) as error:
        pp_fx.transform(model)
    assert not pp_fx.is_transformed(model)
    return str(error.value)


def test_scales_for_a_whole_weight_are_refused():
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.quantization.granularity import PerTensor

    said = _refused(lambda m: quantize_(m, Int8WeightOnlyConfig(granularity=PerTensor(), version=2)))
    assert "q_proj.weight of the decoder layers has 1 scales for 64 rows" in said
    assert "PerRow()" in said


def test_zero_points_are_refused():
    def asymmetric(model):
        quantize_(model, QUANTIZATIONS["int8"]())
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.zero_point = torch.ones_like(weight.scale, dtype=torch.int8)

    assert "1.mlp.up_proj.weight of the decoder layers has zero points" in _refused(asymmetric)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_packed_numbers_are_refused(dtype):
    said = _refused(lambda m: m.model.layers[0].mlp.register_buffer("qweight", torch.zeros(4, 4, dtype=dtype)))
    assert "0.mlp.qweight of the decoder layers is packed into" in said
    assert "Int8WeightOnlyConfig" in said


def test_another_subclass_is_refused_by_its_name():
    class Odd(torch.Tensor):
        pass

    def odd(model):
        model.model.layers[2].mlp.up_proj.weight = nn.Parameter(torch.randn(96, 64).as_subclass(Odd))

    assert "2.mlp.up_proj.weight of the decoder layers is a " in _refused(odd)
