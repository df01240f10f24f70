"""`decode="step"` in exported files: the operators' bodies and native kernels, and whole folders against torch."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import pp_fx
from pp_fx.errors import ExportError
from pp_fx.export import OrtModel, check
from pp_fx.export.functions import DOMAIN, Strongest, StrongestOutput
from pp_fx.export.names import COMPACT, of_kind
from tests.helpers.families import build
from tests.helpers.models import pruned, tiny_llama

GATED = ("strength", "factor", "X", "up", "up_bias", "down", "count")
UNGATED = ("strength", "z", "down", "count")


def session(function, names, kind, library):
    """A file of one operator with its body, dynamic in every dimension."""
    ranks = {"up_bias": 1, "count": 1}
    types = {"strength": TensorProto.FLOAT, "count": TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(n, types.get(n, kind), [None] * ranks.get(n, 2)) for n in names]
    node = helper.make_node(function.name, list(names), ["y"], domain=DOMAIN)
    graph = helper.make_graph([node], "step", inputs, [helper.make_tensor_value_info("y", kind, [None, None])])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function.to_function_proto()], ir_version=11)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def oracle(given):
    """In float64: what is not among a token's strongest is 0."""
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    z = wide["z"] if "z" in wide else wide["factor"] * (wide["X"] @ wide["up"].T + wide["up_bias"])
    least = np.sort(wide["strength"], axis=1)[:, ::-1][:, given["count"][0] - 1 :][:, :1]
    return np.where(wide["strength"] >= least, z, 0) @ wide["down"]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("function", [Strongest, StrongestOutput], ids=lambda f: f.name)
def test_the_operator_is_the_sum_over_the_chosen_channels(request, function, dtype, native):
    names = GATED if function is Strongest else UNGATED
    kind = TensorProto.FLOAT if dtype is np.float32 else TensorProto.FLOAT16
    made = session(function, names, kind, request.getfixturevalue("library") if native else None)
    tolerance = 1e-4 if dtype is np.float32 else 2e-2

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.data())
    def agrees(tokens, channels, hidden, width, data):
        random = np.random.default_rng(data.draw(st.integers(0, 99)))
        factor = random.standard_normal((tokens, channels))
        made_of = {
            "strength": abs(factor).astype(np.float32),
            "factor": factor,
            "z": factor,
            "X": random.standard_normal((tokens, hidden)) / np.sqrt(hidden),
            "up": random.standard_normal((channels, hidden)),
            "up_bias": random.standard_normal(channels),
            "down": random.standard_normal((channels, width)) / np.sqrt(channels),
            "count": np.array([data.draw(st.integers(1, channels))]),
        }
        given = {n: made_of[n] if n in ("strength", "count") else made_of[n].astype(dtype) for n in names}
        (found,) = made.run(None, given)
        np.testing.assert_allclose(found, oracle(given), atol=tolerance, rtol=tolerance)

    agrees()


@pytest.mark.parametrize("wrong", ["count", "up", "down", "X"])
def test_what_does_not_fit_is_an_error_status(library, wrong):
    made = session(Strongest, GATED, TensorProto.FLOAT, library)
    given = {n: np.ones((2, 4), np.float32) for n in ("strength", "factor", "X")}
    given |= {"up": np.ones((4, 4), np.float32), "up_bias": np.ones(4, np.float32), "down": np.ones((4, 3), np.float32)}
    given["count"] = np.array([2])
    assert made.run(None, given)[0].shape == (2, 3)
    given[wrong] = np.array([5]) if wrong == "count" else np.ones((3, 5), np.float32)
    with pytest.raises(Exception, match=r"pp_fx.Strongest.* do not fit each other"):
        made.run(None, given)


CONFIG = pp_fx.ProbePruningConfig(mlp_ratio=0.4, decode="step", decode_ratio=0.5, skip_layers=1, round_to=1)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (tiny_llama, {}),
        (lambda: build("OPT"), {"mlp_ratio": 0.0}),
        pytest.param(lambda: tiny_llama(bias=True), {"mlp_ratio": 0.0}, marks=pytest.mark.slow),
    ],
    ids=["Llama", "OPT, decoding alone", "biases, decoding alone"],
)
def test_an_exported_model_decodes_by_step_as_torch_does(library, tmp_path, make, changes):
    config = pp_fx.ProbePruningConfig.from_dict({**CONFIG.to_dict(), **changes, "freeze_history": True})
    model = pruned(make(), config)
    folder = pp_fx.export.onnx(model, tmp_path / "out")
    assert check(folder).passed
    inputs = [i.name for i in onnx.load(folder / "model.onnx", load_external_data=False).graph.input]
    assert not any(of_kind(name, COMPACT) for name in inputs), "nothing is fed back"
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(3))
    for prompt in (ids, ids[:, :9]):  # one too short to select
        given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **given)
        for ops in (library, None):
            ours = OrtModel.from_pretrained(folder, ops_library=ops)
            assert torch.equal(ours.generate(prompt, attention_mask=torch.ones_like(prompt), **given), expected)
    stateful = onnx.load(folder / "model_stateful.onnx", load_external_data=False)
    assert not any(of_kind(i.name, COMPACT) for i in stateful.graph.input)


def test_a_copy_that_ranks_has_no_onnx_form(tmp_path):
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.0, decode="step", decode_ratio=0.5, step_probe="int8")
    with pytest.raises(ExportError, match="step_probe has no ONNX form"):
        pp_fx.export.onnx(pruned(tiny_llama(), config), tmp_path / "out")
    assert not (tmp_path / "out").exists()
