"""MACs: what pruning adds on the shapes of large models."""

import pytest
from transformers import LlamaConfig

import pp_fx

LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)


@pytest.mark.parametrize("attention", [0.0, 0.4])
def test_probe_and_compensation_add_little_to_a_7b_model(attention):
    """At 20 x 512 tokens, MLP 40%: at most 3% of the dense MACs."""
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=attention)
    macs = pp_fx.explain(LLAMA_2_7B, config, batch=20, length=512).macs
    assert 0 < macs.probe + macs.compensation <= 0.03 * macs.dense
    assert macs.ideal == pytest.approx(1 - (0.4 * 2 / 3 + attention / 6), abs=0.01)
