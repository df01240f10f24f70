"""`static_copies` are the pruned model of one prompt without compensation; `time_shares` sum to less than the call."""

import inspect

import pytest
import torch

import pp_fx
from pp_fx.measure.bounds import static_copies
from pp_fx.measure.time_shares import time_shares
from tests.helpers.models import tiny_llama


def test_static_copies_give_what_the_prompt_gives_without_compensation(ids):
    model = tiny_llama()
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=1, mlp_compensation=None)
    pruned = pp_fx.transform(tiny_llama(), config)
    with torch.no_grad(), pp_fx.history_frozen(pruned):
        dense, expected = model(ids).logits, pruned(ids).logits
        copies = static_copies(model, pruned, ids)
        for one in copies:
            torch.testing.assert_close(one(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(ids).logits, dense), "the dense model stays as it was"
    kept = pruned.model.layers[1].pp_mlp.kept_units
    assert copies.cut.model.layers[1].mlp.down_proj.weight.shape[1] == kept
    assert copies.masked.model.layers[1].mlp.down_proj.weight is model.model.layers[1].mlp.down_proj.weight


@pytest.mark.parametrize(("changes", "attention"), [({}, 0.4), ({"bias": True}, 0.0)])
def test_there_are_none_for_heads_and_biases(ids, changes, attention):
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=attention, skip_layers=1, round_to=1)
    assert static_copies(tiny_llama(**changes), pp_fx.transform(tiny_llama(**changes), config), ids) is None


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
