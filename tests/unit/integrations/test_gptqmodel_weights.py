"""GPTQ and AWQ: the numbers of the file, unchanged, beside gptqmodel's own layers and the format's definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pp_fx
from pp_fx.errors import UnsupportedModelError
from pp_fx.layouts import widened
from tests.helpers.gptq import awq_tensors, checkpoint, gptq_tensors, meaning, random_layer

IDS = torch.arange(40)[None]


class Kernel(nn.Module):
    """A layer as gptqmodel holds it, without gptqmodel: the buffers of a file, and what describes them."""

    QUANT_TYPE = "torch"
    online_full_had = online_partial_had = False
    adapter = None

    def __init__(self, tensors, inputs, outputs, bits, group, bias=None):
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = inputs, outputs, bits, group
        for name, tensor in {**tensors, "bias": bias}.items():
            self.register_buffer(name, tensor)


class AwqKernel(Kernel):
    QUANT_TYPE = "awq_torch"


Kernel.__module__ = AwqKernel.__module__ = "gptqmodel.nn_modules.qlinear"


def layer(method="gptq", inputs=64, outputs=16, bits=4, group=32, symmetric=False, bias=None):
    """A stand-in, and what `meaning` takes of it."""
    made = random_layer(inputs, outputs, bits, group, symmetric)
    if method == "awq":
        return AwqKernel(awq_tensors(*made), inputs, outputs, bits, group, bias), made
    return Kernel(gptq_tensors(*made, bits, group), inputs, outputs, bits, group, bias), made


def beside(module, dtype=torch.float32):
    """A model of this dtype with this layer."""
    return nn.Sequential(module, nn.LayerNorm(module.out_features, dtype=dtype))


@given(
    method=st.sampled_from([("gptq", 2), ("gptq", 4), ("gptq", 8), ("awq", 4)]),
    groups=st.integers(1, 4),
    group=st.sampled_from([8, 32, 40]),
    words=st.integers(1, 5),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_every_width_and_shape(method, groups, group, words, symmetric, dtype, seed):
    torch.manual_seed(seed)
    (method, bits), inputs, outputs = method, groups * group, 8 * words
    bias = torch.randn(outputs).half()
    module, made = layer(method, inputs, outputs, bits, group, symmetric, bias)
    model = beside(module, dtype)
    right = meaning(*made, group, dtype)
    pp_fx.to_torchao(model)
    got, by_row = model[0].weight, groups == 1 and symmetric
    assert type(got).__name__ == ("Int8Tensor" if by_row else "IntxUnpackedToInt8Tensor")
    assert got.dtype == dtype
    if by_row:  # one fp32 scale for each row: rounded once, by torchao
        torch.testing.assert_close(widened(got), right)
    else:
        assert torch.equal(widened(got), right)
    x = torch.randn(3, inputs, dtype=dtype)
    torch.testing.assert_close(model[0](x), nn.functional.linear(x, right, bias.to(dtype)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("outputs", [12, 20])
def test_outputs_that_do_not_fill_a_word(outputs):
    module, made = layer(outputs=outputs)
    assert torch.equal(widened(pp_fx.to_torchao(beside(module))[0].weight), meaning(*made, 32, torch.float32))


def _shuffled(module):
    module.g_idx = module.g_idx.flip(0)


def _uneven(module):
    module.g_idx = (torch.arange(64) >= 40).int()


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("gptq", lambda m: setattr(m, "QUANT_TYPE", "marlin"), r"Kernel, which keeps .*backend='torch'"),
        ("awq", lambda m: setattr(m, "QUANT_TYPE", "awq_gemv"), r"AwqKernel, which keeps .*backend='torch_awq'"),
        ("gptq", _shuffled, "actorder.*desc_act=False"),
        ("gptq", _uneven, "actorder.*desc_act=False"),
        ("gptq", lambda m: setattr(m, "bits", 3), r"numbers of 3 bits.*\(2, 4, 8\)"),
        ("awq", lambda m: setattr(m, "bits", 8), r"numbers of 8 bits.*\(4,\)"),
        ("gptq", lambda m: setattr(m, "group_size", 48), "64 input features in groups of 48.*equal groups"),
        ("gptq", lambda m: setattr(m, "qweight", m.qweight.view(torch.uint8)), "was run already.*load the model again"),
        ("awq", lambda m: setattr(m, "qweight", m.qweight.t()), "was run already.*load the model again"),
        ("gptq", lambda m: setattr(m, "adapter", "lora"), "adapter"),
        ("awq", lambda m: setattr(m, "online_full_had", True), "rotates its input"),
        ("gptq", lambda m: m.to("meta").register_forward_hook(lambda *_: None), "has hooks"),
    ],
)
def test_refusals(method, change, words):
    module, _ = layer(method)
    change(module)
    model = nn.Sequential(layer()[0], module)
    with pytest.raises(UnsupportedModelError, match=f"^1 .*{words}"):
        pp_fx.to_torchao(model)
    assert model[1] is module
    assert isinstance(model[0], Kernel)


@pytest.fixture(scope="module")
def load():
    """`from_pretrained` through gptqmodel, by one of its kernels."""
    for package in ("gptqmodel", "optimum"):
        pytest.importorskip(package, reason=f"transformers loads GPTQ and AWQ through {package}")
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    def from_pretrained(folder, method, backend):
        config = (AwqConfig if method == "awq" else GPTQConfig)(bits=4, backend=backend)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()

    with torch.compiler.set_stance("force_eager"):  # gptqmodel compiles each of its layers
        yield from_pretrained


GPTQ, AWQ = "gptq", "awq"
HALF, BRAIN = torch.float16, torch.bfloat16
CHECKPOINTS = {
    "GPTQ": (GPTQ, "torch", HALF, {}),
    "GPTQ, symmetric": (GPTQ, "torch", HALF, {"symmetric": True}),
    "GPTQ, second version": (GPTQ, "torch", HALF, {"version": "gptq_v2"}),
    "GPTQ, 8 bits": (GPTQ, "torch", HALF, {"bits": 8}),
    "GPTQ, 2 bits": (GPTQ, "torch", HALF, {"bits": 2, "group": 16}),
    "GPTQ, by channel": (GPTQ, "torch", HALF, {"group": -1}),
    "GPTQ, 8 bits by channel, symmetric": (GPTQ, "torch", HALF, {"bits": 8, "group": -1, "symmetric": True}),
    "GPTQ, the default kernel": (GPTQ, "auto", HALF, {}),
    "GPTQ in bf16": (GPTQ, "torch", BRAIN, {}),
    "GPTQ in bf16, the default kernel": (GPTQ, "auto", BRAIN, {}),
    "AWQ": (AWQ, "torch_awq", HALF, {}),
    "AWQ, the default kernel": (AWQ, "auto", HALF, {}),
    "AWQ in bf16": (AWQ, "torch_awq", BRAIN, {}),
    "AWQ in bf16, the default kernel": (AWQ, "auto", BRAIN, {}),
}


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_layers_and_logits_are_those_of_gptqmodel(name, load, tmp_path):
    method, backend, dtype, how = CHECKPOINTS[name]
    weights = checkpoint(tmp_path, method, dtype, **how)
    library, model = load(tmp_path, method, backend), load(tmp_path, method, backend)
    with pytest.raises(UnsupportedModelError, match=r"is packed into torch\.int32.*GPTQ, AWQ.*pp_fx\.to_torchao"):
        pp_fx.transform(model)
    assert pp_fx.to_torchao(model) is model
    with torch.no_grad():
        expected, got = library(IDS).logits, model(IDS).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
        for path, right in weights.items():
            mine, theirs = model.get_submodule(path), library.get_submodule(path)
            assert torch.equal(widened(mine.weight), right), path
            x = torch.randn(8, mine.in_features, dtype=dtype)
            torch.testing.assert_close(mine(x), theirs(x), rtol=0.02, atol=0.02)
            if backend != "auto":  # which computes with other sums
                theirs.bias = None
                weight = theirs(torch.eye(mine.in_features, dtype=dtype)).t()
                # GPTQ's kernel leaves scales in fp16, where a bf16 model has them rounded
                close = {"rtol": 0.01, "atol": 0} if (method, dtype) == (GPTQ, BRAIN) else {"rtol": 0, "atol": 0}
                torch.testing.assert_close(right, weight, **close)
        pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0))
        assert torch.equal(model(IDS).logits, got)
        pp_fx.transform(pp_fx.restore(model), pp_fx.ProbePruningConfig(mlp_ratio=0.5, skip_layers=1))
        assert not torch.equal(model(IDS).logits, got)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 44)
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize(
    ("backend", "how", "words"),
    [
        ("torch", {"act_order": True}, "actorder.*desc_act=False"),
        ("torch", {"bits": 3}, "numbers of 3 bits"),
        ("torch_fused", {}, "TorchFusedLinear, which keeps .*backend='torch'"),
        ("torch_int8", {"bits": 8}, "TorchInt8Linear, which keeps .*backend='torch'"),
    ],
)
def test_what_gptqmodel_loads_and_cannot_be_converted(backend, how, words, load, tmp_path):
    checkpoint(tmp_path, GPTQ, HALF, **how)
    model = load(tmp_path, GPTQ, backend)
    with pytest.raises(UnsupportedModelError, match=words):
        pp_fx.to_torchao(model)
    assert model.config.quantization_config is not None


@pytest.mark.parametrize("method", [GPTQ, AWQ])
def test_after_a_first_call(method, load, tmp_path):
    """The default kernels have packed their weights anew by then; those of backend="torch" have not."""
    checkpoint(tmp_path, method, BRAIN)
    called, plain = load(tmp_path, method, "auto"), load(tmp_path, method, "torch" if method == GPTQ else "torch_awq")
    with torch.no_grad():
        called(IDS)
        expected = plain(IDS).logits
        with pytest.raises(UnsupportedModelError, match="was run already"):
            pp_fx.to_torchao(called)
        got = pp_fx.to_torchao(plain)(IDS).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
