"""Every decoder family: exact at ratio 0, pruned as configured, equal to the original model with zeroed channels."""

import copy
import warnings

import pytest
import torch
from transformers import DynamicCache

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.transform import layers_of

from .families import FAMILIES, VOCABULARY, build

PRUNED = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, attention_compensation="mean"
)


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return mask


def transformed(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what stays dense is tested by test_groups_are_as_expected
        return pp_fx.transform(model, config)


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
    """The original model, its dropped channels zeroed by hooks and the compensation added: prefill and decoding."""
    original = build(name)
    model = transformed(copy.deepcopy(original), PRUNED)
    inputs = {"attention_mask": left_padded(ids)} if padded else {}
    cache = DynamicCache(config=model.config)
    following = ids.flip(1)[:, :4]
    with torch.no_grad(), pp_fx.history_frozen(model):
        got = [model(ids, past_key_values=cache, **inputs).logits]
        if padded:
            inputs = {"attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(following)], 1)}
        got.append(model(following, past_key_values=cache, **inputs).logits)
    chosen = selections_on(cache).layers
    assert sorted(chosen) == [1, 2]  # the first layer is skipped
    zero_channels(original, layers_of(model), chosen)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = {"attention_mask": left_padded(ids)} if padded else {}
        expected = [original(ids, past_key_values=cache, **first).logits]
        expected.append(original(following, past_key_values=cache, **inputs).logits)
    real = left_padded(ids).bool() if padded else torch.ones_like(ids).bool()
    scale = expected[0][real].abs().max().clamp(min=1)
    torch.testing.assert_close(got[0][real] / scale, expected[0][real] / scale, atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1] / scale, expected[1] / scale, atol=1e-4, rtol=0)


def zero_channels(original, rewritten, chosen):
    """Hooks on the original's output projections."""
    paths = {id(m): path for path, m in original.named_modules()}
    twins = [m for m in original.modules() if type(m).__name__ == rewritten[0].original_class.__name__]
    assert len(twins) == len(rewritten)
    assert paths
    for index, groups in chosen.items():
        for kind, selection in groups.items():
            projection = twins[index].get_submodule(rewritten[index].groups[kind].output.module)
            mask = torch.zeros(rewritten[index].groups[kind].output.in_features)
            mask[selection.columns] = 1
            projection.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask, *args[1:]))
            vector = selection.compensation
            projection.register_forward_hook(lambda m, args, out, vector=vector: out + vector)


def test_one_structure_is_captured_once(monkeypatch):
    import importlib

    module = importlib.import_module("pp_fx.structure")
    captured, real = [], module.capture_layer

    def counting(*args):
        captured.append(args)
        return real(*args)

    monkeypatch.setattr(module, "capture_layer", counting)
    from .conftest import tiny_llama

    pp_fx.transform(tiny_llama(layers=12), PRUNED)
    assert len(captured) == 1
