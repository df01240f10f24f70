"""`static_copy` is the pruned model of one prompt without compensation; `time_shares` adds up to less than the call."""

import inspect

import pytest
import torch

import pp_fx
from pp_fx.shares import time_shares
from pp_fx.static import static_copy

from .conftest import tiny_llama


def test_a_static_copy_gives_what_the_prompt_gives_without_compensation(ids):
    model = tiny_llama()
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=1, mlp_compensation=None)
    pruned = pp_fx.transform(tiny_llama(), config)
    with torch.no_grad(), pp_fx.history_frozen(pruned):
        cut = static_copy(model, pruned, ids)
        torch.testing.assert_close(cut(ids).logits, pruned(ids).logits, atol=1e-4, rtol=1e-4)
    assert cut.model.layers[1].mlp.down_proj.weight.shape[1] == pruned.model.layers[1].pp_mlp.kept_units
    assert model.model.layers[1].mlp.down_proj.weight.shape[1] == 96, "the dense model keeps its weights"


@pytest.mark.parametrize(("changes", "attention"), [({}, 0.4), ({"bias": True}, 0.0)])
def test_there_is_none_for_heads_and_biases(ids, changes, attention):
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=attention, skip_layers=1, round_to=1)
    assert static_copy(tiny_llama(**changes), pp_fx.transform(tiny_llama(**changes), config), ids) is None


def test_shares_of_a_call(ids):
    config = pp_fx.ProbePruningConfig(
        mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, compensation_min_tokens=1
    )
    model = pp_fx.transform(tiny_llama(), config)
    forward = inspect.unwrap(type(model.model.layers[1]).forward)
    before = dict(forward.__globals__)
    with torch.no_grad(), pp_fx.history_frozen(model):
        expected = model(ids).logits
        shares = time_shares(model, ids)
        assert torch.equal(model(ids).logits, expected)
    assert set(shares) == {"probe", "selection", "compensation", "history", "gather"}
    assert all(share > 0 for share in shares.values())
    assert sum(shares.values()) < 1
    assert forward.__globals__ == before, "nothing stays timed"
