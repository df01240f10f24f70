"""Models by name, for the command line: folders, GGUF files, the embedded model."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import pp_fx
from pp_fx.errors import InputError
from pp_fx.models import EMBEDDED, embedded_folder, load, load_config
from pp_fx.transform import config_of

from .test_cli import folder  # noqa: F401
from .test_saving import CONFIG_HERE, logits, pruned


def test_a_classifier_is_refused(folder, tmp_path):  # noqa: F811
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no weights for lm_head\.weight: it is no causal language model"):
        load(str(tmp_path))


def test_a_gguf_file(smollm2):
    file = next(embedded_folder().glob("*.gguf"))
    model, tokenizer = load(str(file), torch.float32)
    assert load_config(str(file)).hidden_size == model.config.hidden_size
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), smollm2[0].parameters(), strict=True))
    assert tokenizer("text").input_ids == smollm2[1]("text").input_ids
    assert EMBEDDED == "smollm2"


@pytest.mark.parametrize("apart", [False, True])
def test_a_pruned_folder_comes_back_pruned(folder, tmp_path, ids, apart):  # noqa: F811
    model = pruned()
    model.save_pretrained(tmp_path, quantization_config=not apart)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    again, _ = load(str(tmp_path))
    assert config_of(again) == config_of(model) == CONFIG_HERE
    for a, b in zip(logits(again, ids), logits(model, ids), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert pp_fx.hf_quantizer.saved_settings(load_config(str(tmp_path))) == CONFIG_HERE
