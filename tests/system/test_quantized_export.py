"""`pp_fx.export.onnx(weights=..)`: operators with quantized weights, and whole folders against torch."""

import json
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxscript import ir
from transformers import OPTConfig, OPTForCausalLM

import pp_fx
from pp_fx.errors import ExportError, InputError
from pp_fx.export import OrtModel, check
from pp_fx.export.functions import DOMAIN
from pp_fx.export.quantized_functions import functions_of
from pp_fx.export.quantized_weights import BLOCK, QuantizedColumns, QuantizedRows
from tests.helpers.families import build
from tests.helpers.models import calibrated_llama

INPUTS = {
    "QuantizedRows": ("X", "codes", "scales", "kept"),
    "QuantizedOutput": ("X", "down", "down_scales"),
    "QuantizedStrongest": (
        "strength", "factor", "X", "codes", "scales", "up_bias", "down", "down_scales", "count",
    ),
    "QuantizedStrongestOutput": ("strength", "factor", "down", "down_scales", "count"),
}  # fmt: skip
ROUNDED = 0.03
"""Of the largest number: what rounding x to 8 bits in blocks may cost a native kernel."""


def session(name, given_inputs, bits, library):
    """A file of one operator with its body."""
    function = next(f for f in functions_of(bits) if f.name == name).to_function_proto()
    if not any(o.domain == "com.microsoft" for o in function.opset_import):
        function.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    types = {np.dtype(k): v for k, v in (("f4", 1), ("u1", 2), ("i1", 3), ("i8", 7))}
    inputs = [
        helper.make_tensor_value_info(n, types[given_inputs[n].dtype], [None] * given_inputs[n].ndim)
        for n in INPUTS[name]
    ]
    node = helper.make_node(name, list(INPUTS[name]), ["y"], domain=DOMAIN)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", inputs, [result])
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 23), (DOMAIN, 1), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def operands(name, tokens, channels, blocks, outputs, bits, seed):
    """All inputs of an operator, and the weights behind codes and scales."""
    torch.manual_seed(seed)
    up = QuantizedRows.of(torch.randn(channels, blocks * BLOCK), bits)
    columns = QuantizedColumns.of(torch.randn(outputs, channels))
    width = channels if name == "QuantizedOutput" else blocks * BLOCK
    kept = torch.randperm(channels)[: max(1, channels // 2)]
    return {
        "up": up,
        "columns": columns,
        "X": torch.randn(tokens, width).numpy(),
        "strength": (torch.rand(tokens, channels) + 0.1).numpy(),
        "factor": torch.randn(tokens, channels).numpy(),
        "up_bias": torch.randn(channels).numpy(),
        "codes": up.codes.numpy(),
        "scales": up.scales.numpy(),
        "kept": kept.numpy(),
        "down": columns.codes.numpy(),
        "down_scales": columns.scales.numpy(),
        "count": np.array([max(1, channels // 3)], np.int64),
    }


def expected(name, x):
    """In float64."""
    up = (x["up"].widened() if name in ("QuantizedRows", "QuantizedStrongest") else torch.zeros(1)).double().numpy()
    down = x["columns"].widened().double().numpy()
    if name == "QuantizedRows":
        return x["X"].astype(np.float64) @ up[x["kept"]].T
    if name == "QuantizedOutput":
        return x["X"].astype(np.float64) @ down.T
    z = x["factor"].astype(np.float64)
    if name == "QuantizedStrongest":
        z = z * (x["X"].astype(np.float64) @ up.T + x["up_bias"])
    least = np.sort(x["strength"], axis=1)[:, ::-1][:, x["count"][0] - 1 :][:, :1]
    return np.where(x["strength"] >= least, z, 0) @ down.T


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", INPUTS)
@given(
    tokens=st.integers(1, 11), channels=st.integers(1, 75), blocks=st.integers(1, 4), outputs=st.integers(1, 40),
    bits=st.sampled_from((4, 8)), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_operators(library, name, native, tokens, channels, blocks, outputs, bits, seed):
    x = operands(name, tokens, channels, blocks, outputs, bits, seed)
    found = session(name, x, bits, library if native else None).run(None, {n: x[n] for n in INPUTS[name]})[0]
    wanted = expected(name, x)
    assert found.shape == wanted.shape
    scale = np.abs(wanted).max() + 1
    assert np.abs(found - wanted).max() / scale < (ROUNDED if native else 1e-5)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_number_that_is_not_finite_reaches_the_result(library, number):
    up = QuantizedRows.of(torch.randn(16, 64), 4)
    x = {"X": np.ones((9, 64), np.float32), "codes": up.codes.numpy(), "scales": up.scales.numpy()}
    x |= {"kept": np.arange(16)}
    x["X"][3, 40] = number
    found = session("QuantizedRows", x, 4, library).run(None, x)[0]
    assert np.isfinite(found[[0, 1, 2, 4, 5, 6, 7, 8]]).all()
    assert not np.isfinite(found[3]).any()


def test_inputs_that_do_not_fit_are_refused(library):
    up = QuantizedRows.of(torch.randn(16, 64), 4)
    x = {"X": np.ones((2, 64), np.float32), "codes": up.codes.numpy(), "scales": up.scales.numpy()}
    run = session("QuantizedRows", x | {"kept": np.arange(16)}, 4, library).run
    for wrong, message in (
        ({"kept": np.array([16])}, "out of range"),
        ({"X": np.ones((2, 32), np.float32)}, "do not fit"),
    ):
        with pytest.raises(Exception, match=message):
            run(None, {**x, "kept": np.arange(16), **wrong})


def llama(**settings):
    return calibrated_llama(pp_fx.ProbePruningConfig(mlp_ratio=0.5, **{"decode": "step", **settings}))


def opt():
    config = OPTConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=3,
        ffn_dim=96,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return pp_fx.transform(OPTForCausalLM(config).eval(), pp_fx.ProbePruningConfig(mlp_ratio=0.5, decode="step"))


MODELS = {
    "heads": lambda: llama(attention_ratio=0.5),
    "decoding dense": lambda: llama(decode_ratio=0.0),
    "OPT": opt,
}


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("heads", "int4"), ("OPT", "int8"), pytest.param("decoding dense", "int8", marks=pytest.mark.slow)],
)
def test_a_folder_gives_torchs_logits(kind, weights, tmp_path, library, monkeypatch):
    model = MODELS[kind]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = pp_fx.export.onnx(model, tmp_path / "out", weights=weights)  # compares with the rounded model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert json.loads((folder / "pp_fx.json").read_text())["weights"] == weights
    assert check(folder).passed
    onnx.checker.check_model(str(folder / "model.onnx"))
    graph = ir.load(folder / "model.onnx").graph
    rest = [v for v in graph.initializers.values() if v.dtype == ir.DataType.FLOAT and len(v.shape) == 2]
    left = {v.name.split(".")[-2] for v in rest if v.name.endswith((".weight", ".weight.T"))}
    assert left <= {"embed_positions"}
    whole = sum(4 * p.numel() for p in model.parameters())
    assert (folder / "model.onnx_data").stat().st_size < (0.45 if weights == "int8" else 0.35) * whole
    ids = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(1))
    bodies = OrtModel.from_pretrained(folder, ops_library=None)
    native = OrtModel.from_pretrained(folder, ops_library=library)
    monkeypatch.setenv("PP_FX_CACHE", str(tmp_path / "none"))
    with pytest.warns(UserWarning, match="build-ort-ops"):
        OrtModel.from_pretrained(folder)
    a, b = bodies(ids).logits, native(ids).logits
    assert (a - b).norm() < 0.1 * a.norm()
    assert native.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 44)


def family(name):
    return pp_fx.transform(build(name), pp_fx.ProbePruningConfig(mlp_ratio=0.5))


REFUSED = {
    "unknown": (llama, "int2", InputError, "choose one of 'int8', 'int4'"),
    "half": (lambda: llama().half(), "int4", ExportError, "fp32"),
    "sticky": (lambda: llama(decode="sticky"), "int4", ExportError, "decode='auto' or 'step'"),
    "Conv1D": (partial(family, "GPT-2"), "int4", ExportError, "Conv1D"),
    "fused": (partial(family, "Phi3"), "int4", ExportError, "several in one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_a_file_is_written(case, tmp_path):
    make, weights, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        pp_fx.export.onnx(make(), tmp_path / "out", weights=weights)
    assert not any(tmp_path.iterdir())
