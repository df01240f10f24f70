"""Every decoder family: exact at ratio 0, pruned as configured, equal to the original model with zeroed channels."""

import importlib
import warnings

import pytest
import torch

import pp_fx
from pp_fx.transform import layers_of

from .conftest import tiny_llama
from .families import FAMILIES, VOCABULARY, build
from .zeroed import PRUNED, assert_equals_zeroed, left_padded, transformed


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))


def tokens(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=6, do_sample=False, **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_ratio_zero_is_exact(name, ids):
    model, mask = build(name), left_padded(ids)
    with torch.no_grad():
        dense = model(ids).logits, model(ids, attention_mask=mask).logits
        generated = tokens(model, ids), tokens(model, ids, attention_mask=mask)
        transformed(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0, skip_layers=0))
        assert torch.equal(model(ids).logits, dense[0])
        assert torch.equal(model(ids, attention_mask=mask).logits, dense[1])
        assert torch.equal(tokens(model, ids), generated[0])
        assert torch.equal(tokens(model, ids, attention_mask=mask), generated[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_are_as_expected(name):
    family, model = FAMILIES[name], build(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pp_fx.transform(model, PRUNED)
    said = " ".join(str(w.message) for w in caught if "pp_fx leaves" in str(w.message))
    state = layers_of(model)[-1].states()
    for kind, kept, expected in (("mlp", 0.6, family.mlp), ("attention", 0.5, family.attention)):
        if expected is True:
            assert state[kind].kept_units < state[kind].units
            assert state[kind].kept_units == state[kind].units - int(0.6 * state[kind].units), kept
        else:
            assert kind not in state
            assert f"pp_fx leaves {kind} dense" in said
            assert expected in said
    assert bool(said) == (family.mlp is not True or family.attention is not True)
    reasons = " ".join(layers_of(model)[-1].reasons)
    assert ("the query projection runs whole" in reasons) == (family.query is not True)
    assert family.query is True or family.query in reasons


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_equals_the_original_with_zeroed_channels(name, padded, ids):
    assert_equals_zeroed(build(name), ids, padded)


def test_one_structure_is_captured_once(monkeypatch):
    module = importlib.import_module("pp_fx.structure")
    captured, real = [], module.capture_layer

    def counting(*args):
        captured.append(args)
        return real(*args)

    monkeypatch.setattr(module, "capture_layer", counting)
    pp_fx.transform(tiny_llama(layers=12), PRUNED)
    assert len(captured) == 1
