"""Rounded weights: what they hold, as onnxruntime reads them; what is refused; the model stays as it was."""

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import pp_fx
from pp_fx.errors import ExportError
from pp_fx.export.quantized_weights import BLOCK, QuantizedColumns, QuantizedRows, quantize, rounded_weights, widened
from tests.helpers.models import calibrated_llama

STEPS = pp_fx.ProbePruningConfig(mlp_ratio=0.5, decode="step")


def read_by_onnxruntime(made: QuantizedRows) -> np.ndarray:
    """All rows through GatherBlockQuantized."""
    parts = {"codes": made.codes.numpy(), "scales": made.scales.unsqueeze(-1).numpy()}
    rows = np.arange(len(made.codes))
    numbers = {"gather_axis": 0, "quantize_axis": 2, "block_size": BLOCK, "bits": made.bits}
    node = helper.make_node(
        "GatherBlockQuantized", ["codes", "rows", "scales"], ["y"], domain="com.microsoft", **numbers
    )
    given_rows = helper.make_tensor_value_info("rows", TensorProto.INT64, [None])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(array, name) for name, array in parts.items()]
    graph = helper.make_graph([node], "read", [given_rows], [result], stored)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"rows": rows})[0].reshape(len(rows), -1)


@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 4),
    bits=st.sampled_from((4, 8)),
    seed=st.integers(0, 2**31),
    size=st.sampled_from((1e-6, 1.0, 1e4)),
)
@settings(max_examples=40, deadline=None)
def test_rows_hold_what_onnxruntime_reads(rows, blocks, bits, seed, size):
    torch.manual_seed(seed)
    weight = size * torch.randn(rows, blocks * BLOCK)
    weight[0, :BLOCK] = 0  # nothing to scale by
    made = QuantizedRows.of(weight, bits)
    assert made.bits == bits
    assert made.codes.dtype == torch.uint8
    assert np.array_equal(read_by_onnxruntime(made), made.widened().numpy())
    assert torch.equal(made.widened()[0, :BLOCK], torch.zeros(BLOCK))
    assert torch.equal(widened(made.codes, made.scales), made.widened())
    # never worse than the rounding that just holds a block's largest number
    parts = weight.view(rows, blocks, BLOCK)
    scale = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1))
    codes = torch.where(scale == 0, 0, parts / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    worst = (codes * scale - parts).square().sum(-1).maximum((codes * scale + parts.neg()).square().sum(-1))
    ours = (made.widened() - weight).view(rows, blocks, BLOCK).square().sum(-1)
    flipped = torch.where(scale == 0, 0, -parts / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    mirrored = (flipped * scale + parts).square().sum(-1)
    assert (ours <= worst.maximum(mirrored) * (1 + 1e-5)).all()


@given(outputs=st.integers(1, 9), channels=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_columns_are_rounded_by_output(outputs, channels, seed):
    torch.manual_seed(seed)
    weight = torch.randn(outputs, channels)
    made = QuantizedColumns.of(weight)
    assert made.codes.shape == (channels, outputs)
    assert made.codes.dtype == torch.int8
    assert ((made.widened() - weight).abs() <= made.scales[:, None] * 0.5001).all()
    assert torch.equal(widened(made.codes, made.scales), made.widened())


def test_what_is_held_how():
    model = calibrated_llama(STEPS)
    found = quantize(model, "int4")
    kinds = {name.rsplit(".", 2)[-2]: (type(made), made.bits) for name, made in found.items()}
    assert kinds["down_proj"] == (QuantizedColumns, 8)
    assert kinds["gate_proj"] == kinds["up_proj"] == kinds["q_proj"] == kinds["o_proj"] == (QuantizedRows, 4)
    assert kinds["embed_tokens"] == (QuantizedRows, 8)


def test_the_model_has_the_rounded_numbers_for_a_while():
    model = calibrated_llama(STEPS)
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    found = quantize(model, "int8")
    with rounded_weights(model, found):
        for name, made in found.items():
            assert torch.equal(model.get_parameter(name), made.widened())
        column = next(name for name in before if name.endswith("pp_mlp.column"))
        assert not torch.equal(model.get_buffer(column), before[column])
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("number", [float("nan"), float("inf"), None])
def test_what_loses_too_much_is_refused_by_name(number):
    model = calibrated_llama(STEPS)
    weight = model.model.layers[1].self_attn.q_proj.weight
    with torch.no_grad():
        if number is None:  # a number in each block that all the others vanish beside
            weight.fill_(0.0624)
            weight[:, ::BLOCK] = 1
        else:
            weight[0, 0] = number
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.q_proj\.weight loses"):
        quantize(model, "int4")
