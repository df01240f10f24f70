"""Perplexity: against a plain computation on the logits."""

import pytest
import torch

import pp_fx
from pp_fx.errors import InputError
from pp_fx.evaluate import evaluate, evaluate_decoding
from tests.helpers.models import tiny_llama


def test_decoding_is_evaluated_as_one_pass_would_be(ids):
    model, twin = tiny_llama(), pp_fx.transform(tiny_llama(), pp_fx.ProbePruningConfig(mlp_ratio=0.0))
    a, b = (evaluate_decoding(m, ids[:, :32], ids[:, 32:]) for m in (model, twin))
    assert torch.equal(a.per_sequence, b.per_sequence)
    with torch.no_grad():
        logits = model(ids).logits[:, 31:-1].float().log_softmax(-1)
    expected = -logits.gather(2, ids[:, 32:, None]).mean()
    assert abs(a.nll - expected.item()) < 1e-4


def test_a_single_token_has_nothing_to_predict(llama):
    with pytest.raises(InputError, match="length >= 2"):
        evaluate(llama, torch.randint(2, 97, (2, 1)), 2)
