"""`pp_fx.to_torchao`: the numbers of other libraries, unchanged; what cannot be converted is refused by name."""

import copy
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pp_fx
from pp_fx.errors import StateError, UnsupportedModelError
from pp_fx.layouts import widened
from tests.helpers.models import tiny_llama
from tests.helpers.packed import SCHEMES, packed, scheme

IDS = torch.arange(40)[None]
KINDS = {
    "W4A16": "IntxUnpackedToInt8Tensor",
    "W4A16, zero points": "IntxUnpackedToInt8Tensor",
    "W8A16, zero points": "IntxUnpackedToInt8Tensor",
    "FP8": "Float8Tensor",
    "FP8 by tensor": "Float8Tensor",
}


def linears(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


@pytest.mark.parametrize("name", list(SCHEMES))
def test_numbers_and_logits_are_those_of_the_library(name):
    model = packed(tiny_llama().to(torch.bfloat16), scheme(name))
    library = copy.deepcopy(model)
    with torch.no_grad():
        expected = library(IDS).logits  # its first call widens the weights
        assert pp_fx.to_torchao(model) is model
        for (path, mine), (_, right) in zip(linears(model), linears(library), strict=True):
            assert type(mine.weight).__name__ == KINDS.get(name, "Int8Tensor"), path
            assert torch.equal(widened(mine.weight), right.weight), path
        got = model(IDS).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=0.03 * float(expected.abs().max()))
        pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0))
        assert torch.equal(model(IDS).logits, got)
        pp_fx.transform(pp_fx.restore(model), pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1))
        assert not torch.equal(model(IDS).logits, got)
        assert torch.equal(pp_fx.restore(model)(IDS).logits, got)


@given(
    bits=st.integers(2, 8),
    groups=st.integers(1, 4),
    rows=st.integers(1, 9),
    symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_every_width_and_shape(bits, groups, rows, symmetric, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32 * groups, 8 * rows))
    made = scheme("W4A16").model_copy(
        update={"weights": scheme("W4A16").weights.model_copy(update={"num_bits": bits, "symmetric": symmetric})}
    )
    packed(model, made)
    library = copy.deepcopy(model)
    x = torch.randn(3, 32 * groups)
    with torch.no_grad():
        expected = library(x)
        pp_fx.to_torchao(model)
        assert torch.equal(widened(model[0].weight), library[0].weight)
        torch.testing.assert_close(model(x), expected)


def test_a_folder_of_transformers(tmp_path):
    """`from_pretrained`, `to_torchao`, `transform`, `generate`; the configuration no longer says compressed-tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from transformers import AutoModelForCausalLM

    from tests.helpers.packed import observed

    model = observed(tiny_llama().to(torch.bfloat16), scheme("W8A8"))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.raises(UnsupportedModelError, match=r"compressed-tensors packs it; call pp_fx\.to_torchao"):
        pp_fx.transform(loaded)
    pp_fx.transform(pp_fx.to_torchao(loaded), pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1))
    assert loaded.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 44)
    assert not hasattr(loaded.config, "quantization_config")


def test_refusals():
    plain = tiny_llama()
    with pytest.raises(UnsupportedModelError, match="holds no layers"):
        pp_fx.to_torchao(plain)
    with pytest.raises(StateError, match="is transformed"):
        pp_fx.to_torchao(pp_fx.transform(plain))
    blocks = scheme("FP8")
    blocks.weights.strategy, blocks.weights.block_structure = "block", [16, 16]
    for made, change, words in [
        ("W4A16", lambda m: m(IDS), "was run already"),
        ("W4A16", lambda m: m.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None), "has hooks"),
        ("W4A16", lambda m: setattr(m.model.layers[2].mlp.up_proj, "weight_g_idx", torch.zeros(1)), "actorder"),
        ("FP8", lambda m: setattr(m.model.layers[1].mlp.up_proj, "quantization_scheme", blocks), "has scales by block"),
    ]:
        model = packed(tiny_llama(), scheme(made))
        change(model)
        before = {n: type(m) for n, m in model.named_modules()}, set(model.state_dict())
        with pytest.raises(UnsupportedModelError, match=words):
            pp_fx.to_torchao(model)
        assert before == ({n: type(m) for n, m in model.named_modules()}, set(model.state_dict()))


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UnsupportedModelError, match="pip install 'torchao"):
        pp_fx.to_torchao(tiny_llama())


@pytest.mark.slow
def test_bitsandbytes(tmp_path):
    """8 bits before and after a first call; 4 bits are refused."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama().save_pretrained(tmp_path)

    def load(**kwargs):
        config = BitsAndBytesConfig(**kwargs)
        return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()

    model, called = load(load_in_8bit=True), load(load_in_8bit=True)
    with torch.no_grad():
        expected = called(IDS).logits
        layer = model.model.layers[1].mlp.up_proj.weight
        right = layer.data.float() * layer.SCB[:, None] / 127
        for one in (model, called):
            pp_fx.to_torchao(one)
            torch.testing.assert_close(widened(one.model.layers[1].mlp.up_proj.weight).float(), right)
            got = one(IDS).logits
            torch.testing.assert_close(got, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
            pp_fx.transform(one, pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1))
            assert not torch.equal(one(IDS).logits, got)
    with pytest.raises(UnsupportedModelError, match=r"Linear4bit.*load_in_8bit"):
        pp_fx.to_torchao(load(load_in_4bit=True))
