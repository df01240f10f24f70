"""What happens to a selection when its KV cache is reordered, cropped, reset, copied, expanded or foreign."""

import copy
import dataclasses
import pickle

import pytest
import torch

import pp_fx
from pp_fx.cache import compact_bytes, forget, selections_on
from pp_fx.errors import StateError
from pp_fx.kernels import packed_linear
from pp_fx.runtime.compact import rows_of
from pp_fx.runtime.names import LAYER
from tests.helpers.caches import call, kept, make
from tests.helpers.models import tiny_llama

PRUNED = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, decode="sticky")


@pytest.fixture
def model(llama):
    pp_fx.transform(llama, PRUNED)
    with pp_fx.history_frozen(llama):
        yield llama


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def other(ids):
    return ids.flip(0).flip(1)


KINDS = pytest.mark.parametrize("kind", ["dynamic", "static"])


@KINDS
def test_decoding_keeps_the_prompts_selection_and_a_long_turn_selects_anew(model, ids, kind):
    cache = make(kind, model)
    call(model, ids, cache)
    prompt = kept(cache)
    call(model, ids[:, :1], cache)
    call(model, ids[:, :7], cache)
    assert same(kept(cache), prompt)
    call(model, other(ids)[:, :32], cache)
    assert not same(kept(cache), prompt)


def test_reorder_and_expansion_keep_the_selection(model, ids):
    cache = make("dynamic", model)
    call(model, ids, cache)
    prompt = kept(cache)
    expected = call(model, ids[:, :1], copy.deepcopy(cache))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    got = call(model, ids[[2, 0, 1], :1], cache)
    torch.testing.assert_close(got, expected[[2, 0, 1]], atol=1e-5, rtol=1e-5)
    cache.batch_repeat_interleave(2)
    assert call(model, ids[:, :1].repeat_interleave(2, 0), cache).shape[0] == 6
    cache.batch_select_indices(torch.tensor([0]))
    assert call(model, ids[:1, :1], cache).shape[0] == 1
    assert same(kept(cache), prompt)


def test_a_crop_keeps_the_selection_until_nothing_is_left(model, ids):
    cache = make("dynamic", model)
    call(model, ids, cache)
    prompt = kept(cache)
    expected = call(model, ids[:, 30:35], copy.deepcopy(cache))
    call(model, ids[:, :5], cache)
    cache.crop(-5)
    torch.testing.assert_close(call(model, ids[:, 30:35], cache), expected, atol=1e-5, rtol=1e-5)
    assert same(kept(cache), prompt)
    cache.crop(-int(cache.get_seq_length()))
    short = other(ids)[:, :8]  # too short to select on a filled cache
    assert torch.equal(call(model, short, cache), call(model, short, make("dynamic", model)))
    assert not same(kept(cache), prompt)


@pytest.mark.parametrize("length", [1, 8, 40])
def test_a_reset_static_cache_selects_anew(model, ids, length):
    cache = make("static", model)
    call(model, ids, cache)
    call(model, ids[:, :1], cache)
    cache.reset()
    prompt = other(ids)[:, :length]
    fresh = make("static", model)
    assert torch.equal(call(model, prompt, cache), call(model, prompt, fresh))
    assert same(kept(cache), kept(fresh))
    assert torch.equal(call(model, ids[:, :1], cache), call(model, ids[:, :1], fresh))


@pytest.mark.parametrize("length", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_a_reset_static_cache_selects_anew_when_compiled(model, ids, length):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache, fresh = make("static", model), make("static", model)
    call(compiled, ids, cache)
    call(compiled, ids[:, :1], cache)
    before = kept(cache)
    call(compiled, ids[:, :8], cache)  # not reset: the stored selection counts
    assert same(kept(cache), before)
    cache.reset()
    prompt = other(ids)[:, :length]
    expected = call(model, prompt, fresh)
    torch.testing.assert_close(call(compiled, prompt, cache), expected, atol=1e-5, rtol=1e-5)
    assert same(kept(cache), kept(fresh))
    torch._dynamo.reset()


def test_a_cache_passed_by_position_is_checked_too(model, ids):
    cache = make("static", model)
    call(model, ids, cache)
    cache.reset()
    with torch.no_grad():
        model.model(other(ids)[:, :8], None, None, cache)
    fresh = make("static", model)
    call(model, other(ids)[:, :8], fresh)
    assert same(kept(cache), kept(fresh))


def test_one_compiled_token_on_a_reset_static_cache_raises_with_the_remedy(model, ids):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = make("static", model)
    call(compiled, ids, cache)
    call(compiled, ids[:, :1], cache)
    cache.reset()
    with pytest.raises(RuntimeError, match=r"pp_fx\.cache\.forget"):
        call(compiled, ids[:, :1], cache)
    cache.reset()
    forget(cache)
    assert torch.equal(call(compiled, ids[:, :1], cache), call(model, ids[:, :1], make("static", model)))
    torch._dynamo.reset()


@pytest.mark.parametrize("packed", [True, False])
def test_a_deep_copy_goes_its_own_way(model, ids, packed, monkeypatch):
    """It shares packed weights, which nothing writes to."""
    if not packed:
        monkeypatch.setattr(packed_linear, "PACKED_DTYPES", frozenset())
    elif torch.float32 not in packed_linear.PACKED_DTYPES:
        pytest.skip("oneDNN packs nothing here")
    cache = make("dynamic", model)
    call(model, ids, cache)
    call(model, ids[:, :1], cache)
    copied = copy.deepcopy(cache)
    ours, theirs = (selections_on(c).layers[2]["mlp"].inputs[0][0].weight for c in (cache, copied))
    assert (ours is theirs) == packed
    before = kept(cache)
    assert torch.equal(call(model, ids[:, 5:6], copied), call(model, ids[:, 5:6], cache))
    call(model, other(ids), copied)
    assert same(kept(cache), before)
    assert not same(kept(copied), before)


def test_a_cache_goes_through_a_pickle(model, ids):
    cache = make("dynamic", model)
    call(model, ids, cache)
    call(model, ids[:, :1], cache)
    copied = pickle.loads(pickle.dumps(cache))
    assert torch.equal(call(model, ids[:, 5:6], copied), call(model, ids[:, 5:6], cache))


def test_the_cache_of_another_model_or_transform_is_refused(model, ids):
    cache = make("dynamic", model)
    call(model, ids, cache)
    stranger = pp_fx.transform(tiny_llama(seed=4), PRUNED)
    with pytest.raises(StateError, match="another model"):
        call(stranger, ids[:, :1], cache)
    pp_fx.restore(model)
    pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.2, skip_layers=1, round_to=1, decode="sticky"))
    with pytest.raises(StateError, match="new cache"):
        call(model, ids[:, :1], cache)
    cache.crop(-int(cache.get_seq_length()))
    with pp_fx.history_frozen(model):
        assert torch.equal(call(model, ids, cache), call(model, ids, make("dynamic", model)))


def test_the_cache_of_an_untransformed_model_warns_and_selects(llama, ids):
    cache = make("dynamic", llama)
    call(llama, ids, cache)
    pp_fx.transform(llama, PRUNED)
    with pytest.warns(UserWarning, match="no selection"):
        call(llama, ids[:, :1], cache)
    assert selections_on(cache).layers[2]["mlp"].kept.numel() == llama.model.layers[2].pp_mlp.kept_units


def test_loading_weights_voids_selections(model, ids):
    cache = make("dynamic", model)
    call(model, ids, cache)
    call(model, ids[:, :1], cache)
    weights = rows_of(selections_on(cache).layers[2]["mlp"].inputs[0][0])
    model.load_state_dict(tiny_llama(seed=9).state_dict())
    call(model, ids[:, :1], cache)
    call(model, ids[:, :1], cache)
    fresh = selections_on(cache).layers[2]["mlp"]
    assert not torch.equal(rows_of(fresh.inputs[0][0]), weights)
    mlp = model.model.layers[2].mlp
    rows = torch.cat([w[fresh.columns] for w in (mlp.gate_proj.weight, mlp.up_proj.weight)])
    assert torch.equal(rows_of(fresh.inputs[0][0]), rows)


def decode(model, ids, steps=3):
    cache = make("dynamic", model)
    logits = [call(model, ids, cache)[:, -1:]]
    for i in range(steps):
        logits.append(call(model, ids[:, i : i + 1], cache))
    return torch.cat(logits, 1), cache


def test_compact_weights_are_counted_and_limited(model, ids):
    layer = model.model.layers[2]
    states = layer.states()
    mlp = states["mlp"].kept_units * (3 * 64 + 0) + 64  # gate, up, down rows and the compensation
    attention = states["attention"].kept_units * 16 * 2 * 64 + 64
    expected, cache = decode(model, ids)
    assert compact_bytes(cache) == 2 * 4 * (mlp + attention)  # two pruned layers, fp32
    given = make("dynamic", model)
    call(model, ids, given)
    assert compact_bytes(given) == 2 * 4 * (mlp + attention)  # the prompt keeps what it gathers
    with torch.no_grad():
        own = model(ids).past_key_values
    assert compact_bytes(own) == 0  # a plain forward, which makes its cache itself, pays nothing
    call(model, ids[:, :1], own)
    assert compact_bytes(own) == 2 * 4 * (mlp + attention)
    pp_fx.restore(model)
    per_layer = 4 * (mlp + attention) / 2**20
    for limit, held in ((0, 0), (per_layer * 1.01, 1), (1000, 2)):
        pp_fx.transform(model, pp_fx.ProbePruningConfig(**{**PRUNED.__dict__, "compact_megabytes": limit}))
        with pp_fx.history_frozen(model):
            got, cache = decode(model, ids)
        assert compact_bytes(cache) == held * 4 * (mlp + attention)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        pp_fx.restore(model)
    pp_fx.transform(model, PRUNED)  # as the fixture expects it


def test_inference_mode_and_autocast_give_the_same_result(model, ids):
    expected, _ = decode(model, ids)
    with torch.inference_mode():
        cache = make("dynamic", model)
        call(model, ids, cache)
    assert torch.equal(call(model, ids[:, :1], cache), expected[:, 1:2])  # prompt inside, decoding outside
    for layer in model.model.layers:  # the prompt is shorter than what takes least squares by default
        info = layer.__dict__[LAYER]
        info.settings = dataclasses.replace(info.settings, compensation_min_tokens=1)
    expected, _ = decode(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, cache = decode(model, ids)
    assert got.isfinite().all()
    scale = expected.abs().max()
    assert got.shape == expected.shape
    reference = pp_fx.transform(copy.deepcopy(tiny_llama()), pp_fx.ProbePruningConfig(mlp_ratio=0.0))
    dense = tiny_llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decode(reference, ids)[0], decode(dense, ids)[0])
    assert (got.float() - expected).abs().mean() < 0.05 * scale
