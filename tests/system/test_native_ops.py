"""The native kernels against the operators' function bodies, on odd shapes and types; what is no library is refused."""

import json
import shutil
from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pp_fx.errors import ExportError, InputError
from pp_fx.export import OrtModel, build_ort_ops, check, native_ops
from pp_fx.export.functions import DOMAIN, FUNCTIONS

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BODIES = {function.name: function for function in FUNCTIONS}

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="the native kernels need a C++ compiler"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("PP_FX_CACHE", str(tmp_path_factory.mktemp("cache")))
    assert native_ops.find_ort_ops() is None
    built = build_ort_ops()
    assert native_ops.find_ort_ops() == built
    yield built
    patch.undo()


def session(op, inputs, dtype, library, **settings_of_session):
    """A file with one operator and its body, dynamic in every dimension."""
    kind = TYPES[dtype]
    names = [f"i{n}" for n in range(inputs)]
    ranks = 2 if op == "Solve" else 3
    first = helper.make_tensor_value_info(names[0], kind, [None] * ranks)
    rest = [helper.make_tensor_value_info(n, kind, [None, None]) for n in names[1:]]
    nodes = [helper.make_node(op, names, ["made"], domain=DOMAIN), helper.make_node("Cast", ["made"], ["y"], to=1)]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * ranks)
    graph = helper.make_graph(nodes, op, [first, *rest], [result])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[BODIES[op].to_function_proto()], ir_version=11)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    for name, value in settings_of_session.items():
        setattr(options, name, value)
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def run(made, dtype, *arrays):
    value = onnxruntime.OrtValue
    if dtype == "bfloat16":
        given = [value.ortvalue_from_numpy_with_onnx_type(a.view(np.uint16), TensorProto.BFLOAT16) for a in arrays]
    else:
        given = [value.ortvalue_from_numpy(a) for a in arrays]
    binding = made.io_binding()
    for place, array in zip(made.get_inputs(), given, strict=True):
        binding.bind_ortvalue_input(place.name, array)
    binding.bind_output("y", "cpu")
    made.run_with_iobinding(binding)
    return binding.get_outputs()[0].numpy()


def expected(op, x, *weights):
    """Each operator's definition in fp64."""
    x, weights = x.astype(np.float64), [w.astype(np.float64) for w in weights]
    if op == "CompactOutput":
        return x @ weights[0]
    if op == "Solve":
        return np.linalg.solve(x, weights[0])
    products = [x @ w.T for w in weights]
    return products[0] if op == "CompactLinear" else products[0] / (1 + np.exp(-products[0])) * products[1]


PRODUCTS = {"CompactLinear": 2, "CompactSwiGLU": 3, "CompactOutput": 2}


@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_products_of_any_shape(library, op, dtype):
    made = session(op, PRODUCTS[op], dtype, library)
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(0, 3), st.integers(0, 9), st.sampled_from([0, 1, 3, 15, 16, 17, 31, 33, 70, 400]),
        st.sampled_from([0, 1, 2, 5, 16, 37, 130, 300]), st.integers(0, 99),
    )  # fmt: skip
    def agrees(batch, length, hidden, kept, seed):
        random = np.random.default_rng(seed)
        last = kept if op == "CompactOutput" else hidden
        x = random.standard_normal((batch, length, last)).astype(DTYPES[dtype])
        scale = 1 / np.sqrt(max(last, 1))
        weights = [
            (scale * random.standard_normal((kept, hidden))).astype(DTYPES[dtype]) for _ in range(PRODUCTS[op] - 1)
        ]
        found, right = run(made, dtype, x, *weights), expected(op, x, *weights)
        assert found.shape == right.shape
        np.testing.assert_allclose(found, right, atol=tolerance * 4, rtol=tolerance)

    agrees()


def test_solve_of_any_shape(library):
    made = session("Solve", 2, "float32", library)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 130), st.sampled_from([0, 1, 5, 16, 63, 64, 65, 200]), st.integers(0, 99))
    def agrees(size, columns, seed):
        random = np.random.default_rng(seed)
        root = random.standard_normal((size, size))
        a = (root @ root.T / max(size, 1) + np.eye(size)).astype(np.float32)
        b = random.standard_normal((size, columns)).astype(np.float32)
        np.testing.assert_allclose(run(made, "float32", a, b), expected("Solve", a, b), atol=1e-4, rtol=1e-4)

    agrees()


def test_solve_of_what_is_not_positive_definite_is_not_a_number(library):
    found = run(session("Solve", 2, "float32", library), "float32", -np.eye(3, dtype=np.float32), np.ones((3, 2), "f"))
    assert np.isnan(found).all()


@pytest.mark.parametrize("op", [*PRODUCTS, "Solve"])
def test_shapes_that_do_not_fit_are_an_error_status(library, op):
    made = session(op, {**PRODUCTS, "Solve": 2}[op], "float32", library)
    arrays = [np.ones((2, 4) if op == "Solve" else (1, 2, 4), np.float32)]
    arrays += [np.ones((7, 5), np.float32) for _ in range(PRODUCTS.get(op, 2) - 1)]
    with pytest.raises(Exception, match=f"pp_fx.{op}.* do not fit each other"):
        run(made, "float32", *arrays)


@pytest.mark.parametrize("half", [False, True])
def test_a_model_gives_the_same_text_with_and_without_the_library(library, exported, exported_half, half):
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(3))
    folder = exported_half if half else exported[1]
    native, body = (OrtModel.from_pretrained(folder, ops_library=x) for x in (library, None))
    tolerance = 2e-2 if half else 1e-4
    cache, other = (m(ids).past_key_values for m in (native, body))
    a, b = native(ids[:, :2], past_key_values=cache).logits, body(ids[:, :2], past_key_values=other).logits
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    if not half:
        given = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(native.generate(ids, **given), body.generate(ids, **given))
    assert check(folder).passed


def test_the_kernels_run_in_place_of_the_bodies(library, exported, tmp_path):
    """onnxruntime's own profile: decoding's products and the prompt's solve."""
    model, folder = exported
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.enable_profiling, options.profile_file_prefix = (
        3,
        True,
        str(tmp_path / "profile"),
    )
    options.register_custom_ops_library(str(library))
    made = onnxruntime.InferenceSession(folder / "model.onnx", options)
    ours = OrtModel(made, model.config, model.generation_config, 32, True)
    ids = torch.randint(2, 97, (3, 40))
    ours(ids[:, :1], past_key_values=ours(ids).past_key_values)
    with open(made.end_profiling(), encoding="utf-8") as file:
        ran = Counter(event["args"]["op_name"] for event in json.load(file) if "op_name" in event.get("args", {}))
    assert (ran["Solve"], ran["CompactSwiGLU"], ran["CompactOutput"], ran["CompactLinear"]) == (2, 2, 4, 2)


def test_what_is_no_library_of_this_version_is_refused(library, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="compiler='no-such-compiler' was not found"):
        build_ort_ops(compiler="no-such-compiler")
    with pytest.raises(ExportError, match="cannot build"):
        build_ort_ops(flags=("-no-such-flag",))
    assert native_ops.find_ort_ops() == library, "a failed build leaves the one that works"
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    for path in (other, tmp_path / "missing.so"):
        with pytest.raises(ExportError, match="is no library of pp_fx operators"):
            native_ops.check_library(path)
    monkeypatch.setattr("pp_fx.native_library.__version__", "99.0")
    with pytest.raises(ExportError, match=r"was built by pp_fx .*, this is 99.0; run pp-fx build-ort-ops"):
        native_ops.check_library(library)
    assert native_ops.find_ort_ops() is None, "another version has a library of its own"
