"""Blocks that nobody has seen: structure decides, not names."""

import warnings

import pytest
import torch

import pp_fx
from pp_fx.rewrite.layer import layers_of
from tests.helpers.odd_blocks import (
    DENSE,
    PRUNABLE,
    REFUSED,
    VOCABULARY,
    ClippedQueryBlock,
    FixedHeadsBlock,
    QueryGateBlock,
    odd_model,
)
from tests.helpers.zeroed import PRUNED, assert_equals_zeroed, transformed


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block", PRUNABLE)
def test_names_do_not_matter(block):
    model = transformed(odd_model(block), PRUNED)
    kept = {kind: s.kept_units for kind, s in layers_of(model)[-1].states().items()}
    assert kept == {"mlp": 96 - int(0.6 * 96), "attention": 4 - int(0.6 * 4)}
    assert layers_of(model)[-1].reasons == []


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("block", PRUNABLE)
def test_pruned_equals_the_original_with_zeroed_channels(block, padded, ids):
    assert_equals_zeroed(odd_model(block), ids, padded)


@pytest.mark.parametrize("block", [*PRUNABLE, *DENSE])
def test_ratio_zero_is_exact(block, ids):
    model = odd_model(block)
    with torch.no_grad():
        dense = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
        transformed(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0, skip_layers=0))
        assert torch.equal(model(ids).logits, dense[0])
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), dense[1])


@pytest.mark.parametrize("block", DENSE)
def test_what_must_not_be_pruned_is_left_dense_with_the_reason(block, ids):
    model = odd_model(block)
    with torch.no_grad():
        dense = model(ids).logits
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1))
        assert any(DENSE[block] in str(w.message) for w in caught)
        assert all("mlp" not in layer.states() for layer in layers_of(model))
        assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("block", REFUSED)
def test_a_graph_that_does_not_give_what_the_layer_gives_is_refused(block, ids):
    model = odd_model(block)
    with torch.no_grad():
        dense = model(ids).logits
        with pytest.raises(pp_fx.errors.UnsupportedModelError, match="does not give what the layer gives"):
            pp_fx.transform(model, PRUNED)
        assert not pp_fx.is_transformed(model)
        assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("block", [QueryGateBlock, ClippedQueryBlock])
def test_a_query_with_another_use_or_mixed_heads_runs_whole(block, ids):
    model = transformed(odd_model(block), PRUNED)
    assert layers_of(model)[-1].groups["attention"].inputs == ()
    assert_equals_zeroed(odd_model(block), ids, padded=False)


def test_a_head_count_written_behind_the_core_leaves_the_attention_dense(ids):
    model = transformed(odd_model(FixedHeadsBlock), PRUNED)
    assert set(layers_of(model)[-1].states()) == {"mlp"}
    assert any("cannot run reshape" in reason for reason in layers_of(model)[-1].reasons)
    assert_equals_zeroed(odd_model(FixedHeadsBlock), ids, padded=False)


def test_a_layer_that_is_used_twice_is_refused(ids):
    model = odd_model(PRUNABLE[0])
    model.stack[1] = model.stack[0]
    with pytest.raises(pp_fx.errors.UnsupportedModelError, match="share"):
        pp_fx.transform(model, PRUNED)
    assert not pp_fx.is_transformed(model)


def test_layers_that_share_weights_are_pruned_like_any(ids):
    model = odd_model(PRUNABLE[0])
    for name in ("p", "q", "r"):
        getattr(model.stack[2], name).weight = getattr(model.stack[1], name).weight
    assert_equals_zeroed(model, ids, padded=False)
