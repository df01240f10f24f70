"""Models by name, for the command line: folders, GGUF files, the embedded model."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from pp_fx.errors import InputError
from pp_fx.integrations.hf_config import saved_settings
from pp_fx.models import EMBEDDED, embedded_folder, load, load_config
from pp_fx.rewrite.layer import config_of
from tests.system.test_saving import CONFIG_HERE, logits, pruned


def test_a_classifier_is_refused(folder, tmp_path):
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no weights for lm_head\.weight: it is no causal language model"):
        load(str(tmp_path))


def test_a_gguf_file_is_read_as_the_embedded_model_is(monkeypatch):
    """The embedded model is such a file: tests/system/test_smollm2.py runs it."""
    pytest.importorskip("gguf", reason="needs gguf")
    try:
        file = next(embedded_folder().glob("*.gguf"))
    except InputError as error:
        pytest.skip(str(error))
    calls = []
    monkeypatch.setattr("pp_fx.models._load_gguf", lambda *given: calls.append(given))
    load(str(file), torch.bfloat16)
    load(EMBEDDED, torch.bfloat16)
    assert calls[0] == calls[1] == (file.parent, file.name, torch.bfloat16)
    with pytest.raises(InputError, match="a GGUF file"):
        load(str(file.parent / "missing.gguf"))


@pytest.mark.parametrize("apart", [False, True])
def test_a_pruned_folder_comes_back_pruned(folder, tmp_path, ids, apart):
    model = pruned()
    model.save_pretrained(tmp_path, quantization_config=not apart)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    again, _ = load(str(tmp_path))
    assert config_of(again) == config_of(model) == CONFIG_HERE
    for a, b in zip(logits(again, ids), logits(model, ids), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert saved_settings(load_config(str(tmp_path))) == CONFIG_HERE
