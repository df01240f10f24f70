"""Decoding against the independent reference: sticky, dense and probe; short prompts; the cost of the probe."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.errors import ConfigError
from pp_fx.macs import count_macs
from tests.helpers.caches import call, kept, make
from tests.helpers.models import tiny_llama
from tests.helpers.reference_for import reference_for

PRUNED = {"mlp_ratio": 0.4, "attention_ratio": 0.4, "skip_layers": 1, "round_to": 1}
KEPT = {**PRUNED, "decode": "sticky"}


@st.composite
def generations(draw):
    config = pp_fx.ProbePruningConfig(
        mlp_ratio=draw(st.sampled_from([0.0, 0.3, 0.5])),
        attention_ratio=draw(st.sampled_from([0.0, 0.5])),
        skip_layers=draw(st.sampled_from([0, 1])),
        round_to=1,
        attention_compensation=draw(st.sampled_from(["mean", None])),
        compensation_min_tokens=draw(st.sampled_from([1, 512])),
        decode=draw(st.sampled_from(["sticky", "dense"])),
        compact_megabytes=draw(st.sampled_from([None, 0])),
    )
    heads = draw(st.sampled_from([(4, 4), (4, 2), (4, 1)]))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 44))
    chunks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    padded = [draw(st.integers(0, length - 1)) for _ in range(batch)] if draw(st.booleans()) else [0] * batch
    kind = draw(st.sampled_from(["dynamic", "static"]))
    return config, heads, batch, length, chunks, padded, kind, draw(st.integers(0, 10_000)), draw(st.booleans())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(generations())
def test_decoding_matches_the_reference(case):
    """Tokens fed one by one or several at a time on the cache = one pass with the prompt's selection."""
    config, (heads, kv), batch, length, chunks, padded, kind, seed, bias = case
    model = tiny_llama(heads, kv, bias=bias, seed=seed)
    reference = reference_for(model, config)
    pp_fx.transform(model, config)
    ids = torch.randint(2, 97, (batch, length + sum(chunks)), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(padded):
        mask[row, :count] = 0
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    prompt = reference.forward(ids[:, :length], mask[:, :length])
    assume(prompt.gap > 1e-4)
    dense_from = length if config.decode == "dense" else None
    expected = reference.forward(ids, mask, prompt, dense_from).logits[:, length:]
    cache, start, got = make(kind, model), length, []
    call(model, ids[:, :length], cache, attention_mask=mask[:, :length], position_ids=positions[:, :length])
    for count in chunks:
        part = slice(start, start + count)
        got.append(
            call(model, ids[:, part], cache, attention_mask=mask[:, : part.stop], position_ids=positions[:, part])
        )
        start += count
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(torch.cat(got, 1) / scale, expected / scale, atol=1e-4, rtol=0)


def one_layer(config):
    """A model of one layer: its MLP input does not depend on what the MLP of an earlier call dropped."""
    dense = tiny_llama(layers=1)
    model = pp_fx.transform(copy.deepcopy(dense), config)
    seen = []
    dense.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    return dense, model, seen


def expected_choice(z, weight, count):
    """Kept channels by the paper's score over all rows of z [B, N, C], without history."""
    importance = z.pow(2).mean(0).sum(0)
    return (importance * weight.pow(2).norm(dim=0)).topk(count).indices.sort().values


@pytest.mark.parametrize("every", [1, 3])
def test_probe_decoding_selects_from_the_last_tokens(every, ids):
    config = pp_fx.ProbePruningConfig(
        mlp_ratio=0.4, skip_layers=0, round_to=1, decode="probe", reprobe_every=every, history=None
    )
    dense, model, seen = one_layer(config)
    tokens = torch.cat([ids, ids.flip(1)[:, :9]], 1)
    call(dense, tokens, make("dynamic", dense))
    weight, count_kept = dense.model.layers[0].mlp.down_proj.weight, model.model.layers[0].pp_mlp.kept_units
    cache = make("dynamic", model)
    call(model, ids, cache)
    now = kept(cache)[0, "mlp"]
    for count in range(1, 10):
        end = ids.shape[1] + count
        call(model, tokens[:, end - 1 : end], cache)
        if count % every == 0:
            now = expected_choice(seen[0][:, end - every : end], weight, count_kept)
        assert torch.equal(kept(cache)[0, "mlp"], now), count


def test_the_drift_guard_takes_a_selection_only_below_its_threshold(ids):
    tokens = torch.cat([ids, ids.flip(1)[:, :8]], 1)

    def run(**changes):
        settings = {
            "mlp_ratio": 0.4,
            "skip_layers": 0,
            "round_to": 1,
            "decode": "sticky",
            "reprobe_every": 4,
            **changes,
        }
        model = pp_fx.transform(tiny_llama(layers=2), pp_fx.ProbePruningConfig(**settings))
        cache = make("dynamic", model)
        logits = [call(model, ids, cache)]
        first = kept(cache)
        for position in range(ids.shape[1], tokens.shape[1]):
            logits.append(call(model, tokens[:, position : position + 1], cache))
        return torch.cat(logits, 1), first, kept(cache)

    sticky, prompt, after = run()
    assert all(torch.equal(prompt[k], after[k]) for k in prompt)
    never, _, after = run(drift_threshold=0.0)  # a share is never below 0
    assert torch.equal(never, sticky)
    assert all(torch.equal(prompt[k], after[k]) for k in prompt)
    always, _, after = run(drift_threshold=1.0)
    probed, _, expected = run(decode="probe")
    assert any(not torch.equal(prompt[k], after[k]) for k in prompt)
    torch.testing.assert_close(always, probed, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(expected[k], after[k]) for k in after)


@pytest.mark.parametrize(
    "changes", [pytest.param({"decode": "probe"}, marks=pytest.mark.slow), {"drift_threshold": 0.7}]
)
def test_reprobing_compiles_without_breaks_and_equals_eager(llama, ids, changes):
    from torch._dynamo.utils import counters

    pp_fx.transform(llama, pp_fx.ProbePruningConfig(**{**KEPT, "reprobe_every": 3, **changes}))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    results = []
    with pp_fx.history_frozen(llama):
        for model in (llama, compiled):
            cache = make("static", llama)
            lines = [call(model, ids, cache)[:, -1:]]
            lines += [call(model, ids[:, i : i + 1], cache) for i in range(10)]
            results.append((torch.cat(lines, 1), kept(cache)))
    torch.testing.assert_close(*(r[0] for r in results), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in results[0][1])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 8
    torch._dynamo.reset()


def test_a_batch_of_another_size_starts_the_window_anew(llama, ids):
    pp_fx.transform(llama, pp_fx.ProbePruningConfig(**PRUNED, decode="probe", reprobe_every=3))
    cache = make("dynamic", llama)
    call(llama, ids, cache)
    call(llama, ids[:, :2], cache)
    cache.batch_select_indices(torch.tensor([0]))
    call(llama, ids[:1, :2], cache)
    assert selections_on(cache).windows[2]["mlp"].shape[0] == 1
    assert selections_on(cache).age == 2  # the two tokens before do not count
    call(llama, ids[:1, :1], cache)
    assert selections_on(cache).age == 0  # probed


@pytest.mark.parametrize("history", ["channel", "position"])
def test_short_prompts_are_decided_by_the_history_after_calibration(llama, ids, history):
    config = pp_fx.ProbePruningConfig(**KEPT, history=history, history_length=40)
    pp_fx.transform(llama, config)
    pp_fx.calibrate(llama, ids, progress=False)
    state = llama.model.layers[2].pp_mlp
    energy = state.energy if history == "channel" else state.energy.mean(0)
    weight = llama.model.layers[2].mlp.down_proj.weight
    best = (energy * weight.pow(2).norm(dim=0)).topk(state.kept_units).indices.sort().values
    for length in (1, 8, 31):
        cache = make("dynamic", llama)
        call(llama, ids[:, :length], cache)
        assert torch.equal(kept(cache)[2, "mlp"], best)
    cache = make("dynamic", llama)
    call(llama, ids[:, :32], cache)
    assert not torch.equal(kept(cache)[2, "mlp"], best)


def test_short_prompts_are_probed_without_calibration(llama, ids):
    pp_fx.transform(llama, pp_fx.ProbePruningConfig(**KEPT))
    selections = []
    for prompt in (ids[:, :8], ids.flip(0).flip(1)[:, :8]):
        cache = make("dynamic", llama)
        with pp_fx.history_frozen(llama):
            call(llama, prompt, cache)
        selections.append(kept(cache)[2, "mlp"])
    assert not torch.equal(*selections)


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("wide", [1.5, 2.7, 4])
def test_the_default_probe_costs_at_most_three_percent(kv, wide):
    model = tiny_llama(4, kv, layers=2, intermediate=int(64 * wide))
    pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.2, attention_ratio=0.2, skip_layers=0, round_to=1))

    @settings(deadline=None)
    @given(st.integers(1, 64), st.integers(64, 4096))
    def cheap(batch, length):
        macs = count_macs(model, batch, length)
        assert 0 < macs.probe <= 0.03 * macs.dense

    cheap()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("decode", "fast", "'sticky', 'dense', 'probe'"),
        ("reprobe_every", 0, "reprobe_every=0"),
        ("drift_threshold", 1.5, "drift_threshold=1.5"),
        ("compact_megabytes", -1, "compact_megabytes=-1"),
    ],
)
def test_bad_settings_are_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        pp_fx.ProbePruningConfig(**{field: value})


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"drift_threshold=0\.5"):
        pp_fx.ProbePruningConfig(decode="dense", drift_threshold=0.5)
    with pytest.raises(ConfigError, match="history='position'"):
        pp_fx.ProbePruningConfig(decode="probe", history="position")
    with pytest.raises(ConfigError, match="history='position'"):
        pp_fx.ProbePruningConfig(decode="rolling", history="position")
    with pytest.raises(ConfigError, match="would have nothing to probe"):
        pp_fx.ProbePruningConfig(decode="rolling", probe=None, drift_threshold=0.5)
    assert not pp_fx.ProbePruningConfig(decode="rolling", probe=None).reprobes


def test_rolling_is_probe_with_a_threshold_if_it_has_one(ids):
    """Of a generation; in an engine it is something else (test_engine_decoding.py)."""
    tokens = torch.cat([ids, ids.flip(1)[:, :8]], 1)

    def run(**changes):
        settings = {"mlp_ratio": 0.4, "skip_layers": 0, "round_to": 1, "reprobe_every": 4, **changes}
        model = pp_fx.transform(tiny_llama(layers=2), pp_fx.ProbePruningConfig(**settings))
        cache = make("dynamic", model)
        parts = [ids, *tokens[:, ids.shape[1] :].split(1, 1)]
        return torch.cat([call(model, part, cache) for part in parts], 1)

    assert torch.equal(run(decode="rolling"), run(decode="probe"))
    guarded = run(decode="rolling", drift_threshold=0.0)
    assert torch.equal(guarded, run(decode="sticky", drift_threshold=0.0))
    assert not torch.equal(guarded, run(decode="rolling"))
