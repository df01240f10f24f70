"""The no-regret guard: small calls stay dense to the bit, others are pruned as without it; explain says so."""

import dataclasses
import math
import warnings

import pytest
import torch
from transformers import DynamicCache

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.measure.bytes import block_bytes
from pp_fx.measure.macs import count_macs, kept_head_share
from pp_fx.rewrite import break_even as guard
from pp_fx.rewrite import cost_model
from pp_fx.runtime.engine_step import EngineStep
from pp_fx.runtime.names import STEP
from pp_fx.runtime.plan import plan_call
from pp_fx.runtime.state import states_of
from tests.helpers.models import tiny_llama

CONFIG = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, decode="sticky", guard=True
)


@pytest.fixture
def measured(monkeypatch):
    """Times in place of measurements: pruning pays from 64 tokens on."""
    calls = []

    def ratio(layer, call):
        calls.append(call[0][0].shape[1] if call[0] else call[1]["hidden_states"].shape[1])
        return 1.2 if calls[-1] < 64 else 0.8

    monkeypatch.setattr(guard, "_ratio", ratio)
    monkeypatch.setattr(guard, "_measured", {})
    return calls


@pytest.fixture
def modelled(monkeypatch):
    """The configuration of a guard by the cost model, by which pruning pays from 64 tokens on whatever the layer."""
    monkeypatch.setattr(cost_model, "tokens_that_pay", lambda *_: 64)
    return dataclasses.replace(CONFIG, guard=None)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({32: 0.9, 64: 0.8}, 32),
        ({32: 1.1, 64: 1.0, 128: 0.7}, 64),
        ({32: 0.9, 64: 1.1, 128: 0.7}, 128),
        ({32: 0.9, 64: 1.01}, math.inf),
    ],
)
def test_break_even_is_where_pruning_pays_from_then_on(ratios, expected):
    assert guard.break_even(ratios) == expected


@pytest.mark.parametrize("compiled", [False, True])
def test_small_calls_are_dense_and_large_ones_pruned(measured, compiled):
    small, large = torch.randint(2, 97, (1, 40)), torch.randint(2, 97, (2, 40))
    dense, free = tiny_llama(), tiny_llama()
    pp_fx.transform(free, dataclasses.replace(CONFIG, guard=False))
    guarded = pp_fx.transform(tiny_llama(), CONFIG)
    torch._dynamo.reset()
    forward = torch.compile(guarded, fullgraph=True, backend="eager") if compiled else guarded
    with torch.no_grad(), pp_fx.history_frozen(free), pp_fx.history_frozen(guarded):
        torch.testing.assert_close(forward(small).logits, dense(small).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(forward(large).logits, free(large).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(free(large).logits, dense(large).logits, atol=1e-2)
    assert measured == [32, 64, 128, 256], "one structure is measured once, up to the context length"


def test_decoding_after_a_small_prompt_is_dense_and_after_a_large_one_sticky(measured):
    model, dense = pp_fx.transform(tiny_llama(), CONFIG), tiny_llama()
    small = torch.randint(2, 97, (1, 40))
    assert torch.equal(
        model.generate(small, max_new_tokens=5, do_sample=False),
        dense.generate(small, max_new_tokens=5, do_sample=False),
    )
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.randint(2, 97, (2, 40)), past_key_values=cache)
        before = selections_on(cache).layers[1]["mlp"].kept
        model(torch.randint(2, 97, (2, 3)), past_key_values=cache)
    assert selections_on(cache).layers[1]["mlp"].kept is before


def test_calibration_reads_batches_of_every_size(measured):
    free = pp_fx.transform(tiny_llama(), dataclasses.replace(CONFIG, guard=False))
    guarded, ids = pp_fx.transform(tiny_llama(), CONFIG), torch.randint(2, 97, (3, 40))
    for model in (free, guarded):
        pp_fx.calibrate(model, ids, batch_size=2, progress=False)
    for a, b in zip(states_of(free), states_of(guarded), strict=True):
        assert (a.mean is None and b.mean is None) or torch.equal(a.mean, b.mean)
    assert all(layer.pp_layer.guard_tokens == 64 for layer in guarded.model.layers[1:])


def test_explain_reports_it(measured):
    model = pp_fx.transform(tiny_llama(), CONFIG)
    report = pp_fx.explain(model)
    assert report.layers[0].dense == ()
    assert report.layers[1].dense == ("guard: calls of fewer than 64 tokens",)
    assert "guard: calls of fewer than 64 tokens" in str(report)


def test_macs_and_bytes_are_those_of_what_runs(measured):
    free = pp_fx.transform(tiny_llama(), dataclasses.replace(CONFIG, guard=False))
    guarded = pp_fx.transform(tiny_llama(), CONFIG)
    assert count_macs(guarded, 2, 32) == count_macs(free, 2, 32)
    assert block_bytes(guarded, 64) == block_bytes(free, 64)
    small = count_macs(guarded, 1, 63)
    assert (small.pruned, small.overhead) == (small.dense, 0)
    assert pp_fx.explain(guarded, length=63).macs == small
    assert kept_head_share(guarded, 63) == 1 > kept_head_share(guarded, 64)
    dense, read = block_bytes(guarded, 63)
    assert dense == read > block_bytes(guarded, 64)[1]


def test_a_measurement_leaves_no_trace(monkeypatch):
    """A real one: the history is as before, and the layers prune afterwards."""
    monkeypatch.setattr(guard, "_measured", {})
    monkeypatch.setattr(guard, "TOKENS", (32, 64))
    model = pp_fx.transform(tiny_llama(), CONFIG)
    states = [s for layer in model.model.layers for s in layer.states().values() if s.prunes]
    assert all(float(s.seen) == 0 and s.mode == "run" for s in states)
    assert all(layer.pp_layer.prunes for layer in model.model.layers[1:])
    assert len(guard._measured) == 1
    assert set(guard._measured.values()) <= {32, 64, math.inf}


def test_a_failed_measurement_leaves_the_model_as_it_was(monkeypatch, llama):
    def broken(layer, call):
        raise KeyboardInterrupt

    monkeypatch.setattr(guard, "_ratio", broken)
    monkeypatch.setattr(guard, "_measured", {})
    with pytest.raises(KeyboardInterrupt):
        pp_fx.transform(llama, CONFIG)
    assert not pp_fx.is_transformed(llama)


def test_what_tries_ratios_out_is_not_guarded(monkeypatch):
    monkeypatch.setattr(guard, "_ratio", lambda layer, call: 2.0)
    monkeypatch.setattr(guard, "_measured", {})
    ids, settings = torch.randint(2, 97, (6, 40)), {"held_out": 2, "progress": False, "kinds": ("mlp",)}
    free = dataclasses.replace(CONFIG, skip_layers=0, guard=False)
    found = pp_fx.allocate(tiny_llama(), 0.2, ids, config=dataclasses.replace(free, guard=True), **settings)
    assert found.guard
    assert found.mlp_ratio == pp_fx.allocate(tiny_llama(), 0.2, ids, config=free, **settings).mlp_ratio


def test_static_selection_needs_no_guard():
    with pytest.raises(pp_fx.errors.ConfigError, match="set guard=False"):
        pp_fx.ProbePruningConfig(probe=None, guard=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_cost_model_keeps_small_calls_dense_without_a_cache(modelled, compiled):
    small, large = torch.randint(2, 97, (1, 40)), torch.randint(2, 97, (2, 40))
    dense, free = tiny_llama(), pp_fx.transform(tiny_llama(), dataclasses.replace(CONFIG, guard=False))
    guarded = pp_fx.transform(tiny_llama(), modelled)
    torch._dynamo.reset()
    forward = torch.compile(guarded, fullgraph=True, backend="eager") if compiled else guarded
    with torch.no_grad(), pp_fx.history_frozen(free), pp_fx.history_frozen(guarded):
        assert torch.equal(forward(small, use_cache=False).logits, dense(small, use_cache=False).logits)
        torch.testing.assert_close(forward(large, use_cache=False).logits, free(large).logits, rtol=0, atol=1e-5)
    assert pp_fx.explain(guarded).layers[1].dense == ("guard: calls of fewer than 64 tokens without a KV cache",)


def test_what_decoding_reuses_is_selected_by_prompts_of_any_size(modelled):
    free = pp_fx.transform(tiny_llama(), dataclasses.replace(CONFIG, guard=False))
    guarded, dense, small = pp_fx.transform(tiny_llama(), modelled), tiny_llama(), torch.randint(2, 97, (1, 40))
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = [torch.stack(model.generate(small, **settings).logits) for model in (guarded, free, dense)]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-2)
    assert block_bytes(guarded, 40) == block_bytes(free, 40)
    assert count_macs(guarded, 1, 40).pruned > count_macs(free, 1, 40).pruned


@pytest.mark.parametrize("decode", ["auto", "dense"])
def test_a_small_prompt_before_dense_steps_is_dense(modelled, decode):
    config = dataclasses.replace(modelled, decode=decode, attention_ratio=0.0, step_batch=0)
    guarded, dense, small = pp_fx.transform(tiny_llama(), config), tiny_llama(), torch.randint(2, 97, (1, 40))
    tokens = [model.generate(small, max_new_tokens=5, do_sample=False) for model in (guarded, dense)]
    assert torch.equal(*tokens)
    cache = DynamicCache()
    with torch.no_grad():
        guarded(small, past_key_values=cache)
        got = guarded(small[:, :3], past_key_values=cache).logits  # the cache holds tokens and no selection: no warning
        assert torch.equal(got, dense(torch.cat([small, small[:, :3]], 1)).logits[:, 40:]) or torch.allclose(
            got, dense(torch.cat([small, small[:, :3]], 1)).logits[:, 40:], atol=1e-4
        )


def test_layers_are_judged_one_by_one(monkeypatch):
    found = iter((0, 64, math.inf))
    monkeypatch.setattr(cost_model, "tokens_that_pay", lambda *_: next(found))
    with pytest.warns(UserWarning, match="layers 2 stay dense"):
        model = pp_fx.transform(tiny_llama(), dataclasses.replace(CONFIG, guard=None, skip_layers=0, decode="dense"))
    assert [layer.pp_layer.guard_tokens for layer in model.model.layers] == [0, 64, math.inf]
    assert [layer.dense for layer in pp_fx.explain(model).layers] == [
        (),
        ("guard: calls of fewer than 64 tokens",),
        ("guard: calls of any size",),
    ]


def test_a_step_of_an_engine_is_judged_by_its_prompt_tokens(modelled):
    config = dataclasses.replace(modelled, decode="auto", attention_ratio=0.0, step_batch=None)
    info = pp_fx.transform(tiny_llama(), config).model.layers[1].pp_layer
    row = torch.zeros(1, 100, 64)
    few = EngineStep(torch.arange(63), torch.arange(63, 100), prunes=True)
    many = EngineStep(torch.arange(64), torch.arange(64, 100), prunes=True)
    assert not plan_call(info, row, None, {STEP: few}).selects
    plan = plan_call(info, row, None, {STEP: many})
    assert (plan.selects, plan.shape, plan.engine) == (True, (1, 64), many)
    info.settings = dataclasses.replace(info.settings, freeze_history=True)  # decides nothing while it runs
    assert plan_call(info, row, None, {STEP: few}).once


def test_a_prompt_that_no_layer_prunes_says_so_once(modelled):
    model = pp_fx.transform(tiny_llama(), dataclasses.replace(modelled, decode="dense"))
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            model(torch.randint(2, 97, (1, 40)))
        assert ["fewer than 64 tokens runs dense" in str(w.message) for w in said] == [True]
        model(torch.randint(2, 97, (2, 40)))  # large enough
        model(torch.randint(2, 97, (1, 8)))  # below min_select_tokens
        pp_fx.calibrate(model, torch.randint(2, 97, (2, 40)), batch_size=1, progress=False)  # prunes whatever the size
    assert len(said) == 1


def test_a_prompt_whose_selection_decoding_reuses_is_pruned_and_says_nothing(modelled):
    """On a KV cache, the caller's or the model's own; without one it runs dense, and says so."""
    model, dense = pp_fx.transform(tiny_llama(), modelled), tiny_llama()
    ids = torch.randint(2, 97, (1, 40))
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-3)
        assert not said
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense(ids).logits)
    assert ["runs dense" in str(w.message) for w in said] == [True]
