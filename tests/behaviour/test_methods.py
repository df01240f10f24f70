"""Rivals: what each keeps, by its own formula; static ones need calibration and no probe; comparison and allocation."""

import contextlib
import dataclasses

import pytest
import torch

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.errors import ConfigError, InputError, StateError
from pp_fx.macs import count_macs
from pp_fx.measure.planners import plan_ratios
from pp_fx.methods import METHODS, Method
from pp_fx.rewrite.layer import layers_of

SAME = {"skip_layers": 1, "round_to": 1, "ratio_digits": None, "decode": "sticky"}


def mlp_states(model, ids):
    """Intermediate state of every MLP of the original model: a list of [B, T, C]."""
    seen = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


FORMULAS = {
    "wanda_sp": lambda z, w: z.square().mean((0, 1)).sqrt() * w.abs().sum(0),
    "flap": lambda z, w: z.var((0, 1), correction=0) * w.square().sum(0),
    "griffin": lambda z, w: torch.nn.functional.normalize(z, dim=-1).square().sum((0, 1)),
    "full_batch": lambda z, w: z.square().mean((0, 1)) * w.pow(4).sum(0).sqrt(),
    "magnitude": lambda z, w: w.square().sum(0),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_first_pruned_layer_keeps_what_the_formula_says(llama, ids, name):
    z, weight = mlp_states(llama, ids)[1], llama.model.layers[1].mlp.down_proj.weight.clone()
    config = METHODS[name].config(0.4, **SAME)
    pp_fx.calibrate(pp_fx.transform(llama, config), ids, progress=False)
    with torch.no_grad():
        kept = selections_on(llama(ids, use_cache=True).past_key_values).layers[1]["mlp"].kept
    expected = FORMULAS[name](z, weight).topk(len(kept)).indices.sort().values
    assert len(kept) < 96
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_prunes_mlp_and_attention_alike(llama, ids, name):
    config = plan_ratios(name, llama, METHODS[name].config(0.3, 0.4, **SAME), ids)
    pp_fx.calibrate(pp_fx.transform(llama, config), ids, progress=False)
    macs, static = count_macs(llama, *ids.shape), config.probe is None
    assert macs.ideal == pytest.approx(0.8, abs=0.07)
    assert (macs.probe == 0) == static
    with torch.no_grad():
        logits = [llama(batch, use_cache=True) for batch in (ids, ids.flip(0, 1))]
    assert all(out.logits.isfinite().all() for out in logits)
    first, second = (selections_on(out.past_key_values).layers[2]["mlp"].kept for out in logits)
    if static:
        assert torch.equal(first, second)


def test_a_static_method_asks_for_calibration(llama, ids):
    pp_fx.transform(llama, METHODS["wanda_sp"].config(0.4, **SAME))
    with pytest.raises(StateError, match=r"pp_fx\.calibrate"):
        llama(ids)
    with pytest.raises(ConfigError, match="probe=None"):
        pp_fx.ProbePruningConfig(probe=None, history=None)


def test_flap_moves_channels_between_layers_within_the_budget(llama, ids):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[:60] *= 0.01  # channels that hardly move
    config = METHODS["flap"].config(0.4, **SAME)
    planned = plan_ratios("flap", llama, config, ids)
    assert not pp_fx.is_transformed(llama)
    assert planned.mlp_ratio[0] == 0
    assert planned.mlp_ratio[1] > planned.mlp_ratio[2]
    assert sum(planned.mlp_ratio) / 3 == pytest.approx(0.4, abs=0.02)


def test_a_method_may_bring_its_own_planner(llama, monkeypatch):
    given = []
    monkeypatch.setitem(METHODS, "mine", Method("mine", "", "", planner=lambda *all: given.append(all) or "planned"))
    assert plan_ratios("mine", llama, "config", "batches") == "planned"
    assert given == [(llama, "config", "batches")]


def test_ratios_by_layer_round_trip_and_are_checked(llama, ids):
    config = pp_fx.ProbePruningConfig(mlp_ratio=(0.0, 0.25, 0.5), round_to=1)
    assert pp_fx.ProbePruningConfig.from_json(config.to_json()) == config
    pp_fx.transform(llama, config)
    assert [layer.states()["mlp"].kept_units for layer in layers_of(llama)] == [96, 72, 48]
    pp_fx.restore(llama)
    with pytest.raises(ConfigError, match="names 2 layers"):
        pp_fx.transform(llama, pp_fx.ProbePruningConfig(mlp_ratio=(0.1, 0.2)))
    for bad in ((), (0.5, 1.0, 0.0), (-0.1, 0.0, 0.0), (0.1, "x", 0.0)):
        with pytest.raises(ConfigError, match="mlp_ratio"):
            pp_fx.ProbePruningConfig(mlp_ratio=bad)


def test_allocate_spends_the_budget_where_it_hurts_least(llama, ids):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight *= 1e-3  # a layer that does next to nothing
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    base = pp_fx.ProbePruningConfig(round_to=1, skip_layers=0)
    kinds = ("mlp",)
    config = pp_fx.allocate(llama, 0.2, ids, config=base, kinds=kinds, held_out=1, strength=1.0, progress=False)
    assert not pp_fx.is_transformed(llama)
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())
    assert dataclasses.replace(config, mlp_ratio=base.mlp_ratio, attention_ratio=0.0) == base
    assert config.mlp_ratio[1] == max(config.mlp_ratio) > 0.5
    pp_fx.transform(llama, config)
    assert 1 - count_macs(llama, 3, 40).ideal == pytest.approx(0.2, abs=0.04)


def test_allocate_by_time_spends_more_where_time_is_won(llama, ids, monkeypatch):
    """Attention made to look ten times as slow as its MACs: more of it is dropped than by MACs."""
    import importlib

    module = importlib.import_module("pp_fx.measure.allocate")
    monkeypatch.setattr(module, "_losses", lambda model, states, *_: [[0.0, 0.1, 0.3, 0.6, 1.0]] * len(states))
    base = pp_fx.ProbePruningConfig(round_to=1, skip_layers=0)

    def seconds(model, states, sizes, ids):
        timed = [size * (10 if s.kind == "attention" else 1) for s, size in zip(states, sizes, strict=True)]
        return sum(timed), timed

    by_macs = pp_fx.allocate(llama, 0.2, ids, config=base, held_out=1, progress=False)
    monkeypatch.setattr(module, "_seconds", seconds)
    by_time = pp_fx.allocate(llama, 0.2, ids, config=base, held_out=1, cost="time", progress=False)
    assert sum(by_time.attention_ratio) > sum(by_macs.attention_ratio)


def test_measured_seconds_are_those_of_the_decoder(ids):
    from pp_fx.measure.allocate import _seconds
    from pp_fx.measure.macs import unit_macs
    from tests.helpers.models import tiny_llama

    model = tiny_llama()
    model = pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.5, attention_ratio=0.5, skip_layers=0))
    pairs = [(layer, kind, s) for layer in layers_of(model) for kind, s in layer.states().items()]
    kept = [s.kept_units for *_, s in pairs]
    sizes = [unit_macs(layer, layer.groups[kind]) * s.units for layer, kind, s in pairs]
    with contextlib.suppress(InputError):  # so small a model may save no time
        dense, saved = _seconds(model, [s for *_, s in pairs], sizes, ids)
        assert 0 < dense < 60
        assert len(saved) == len(sizes)
    assert [s.kept_units for *_, s in pairs] == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mac_reduction": 1.5}, "mac_reduction=1.5"),
        ({"mac_reduction": 0.9}, "at most"),
        ({"mac_reduction": 0}, "mac_reduction=0"),
        ({"mac_reduction": 0.2, "kinds": ("mlps",)}, "kinds"),
        ({"mac_reduction": 0.2, "kinds": "mlp"}, "kinds='mlp' is not valid; give a tuple"),
        ({"mac_reduction": 0.2, "held_out": 3}, "held_out=3"),
        ({"mac_reduction": 0.2, "cost": "joules"}, "cost='joules'"),
        ({"mac_reduction": 0.2, "strength": -1}, "strength=-1"),
    ],
)
def test_allocate_refuses(llama, ids, arguments, message):
    arguments = {"held_out": 1, "config": pp_fx.ProbePruningConfig(skip_layers=1), **arguments}
    with pytest.raises(InputError, match=message):
        pp_fx.allocate(llama, batches=ids, progress=False, **arguments)
    assert not pp_fx.is_transformed(llama)


def test_compare_gives_what_evaluate_gives(llama, ids):
    from pp_fx.evaluate import evaluate

    found = pp_fx.compare(
        llama, ids, ids.flip(1), methods=("default", "flap"), ratios=(0.3,), batch=3, time_batch=1, repeats=1,
        changes={"skip_layers": 1, "round_to": 1}, progress=False,
    )  # fmt: skip
    assert not pp_fx.is_transformed(llama)
    assert [r["method"] for r in found["rows"]] == ["default", "flap"]
    pp_fx.transform(llama, METHODS["default"].config(0.3, skip_layers=1, round_to=1))
    pp_fx.calibrate(llama, ids.flip(1), progress=False)
    assert found["settings"]["calibration"] == list(ids.shape)
    assert found["settings"]["changes"] == {"skip_layers": 1, "round_to": 1}
    row = found["rows"][0]
    assert row["nll"] == pytest.approx(evaluate(llama, ids, 3).nll, abs=1e-6)
    assert row["time_ratio"] > 0
    assert row["macs"]["total"] == pytest.approx(sum(row["macs"][k] for k in ("kept", "probe", "compensation")))
    with pytest.raises(StateError, match="model is transformed"):
        pp_fx.compare(llama, ids, ids, methods=("paper",), ratios=(0.3,), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ("best",)}, "'best' is unknown"),
        ({"methods": "default"}, "methods='default' is not valid"),
        ({"ratios": 0.4}, "ratios=0.4 is not valid"),
        ({"ratios": ()}, r"ratios=\(\) is not valid"),
        ({"time_batch": -5}, "time_batch=-5"),
        ({"repeats": 0}, "repeats=0"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_compare_refuses(llama, ids, arguments, message):
    with pytest.raises(InputError, match=message):
        pp_fx.compare(llama, ids, ids, progress=False, **arguments)


def test_a_ratio_of_zero_is_dense_with_every_method(llama, ids):
    names = tuple(METHODS)
    found = pp_fx.compare(llama, ids, ids, methods=names, ratios=(0.0,), time_batch=0, progress=False)
    assert [row["nll_above_dense"] for row in found["rows"]] == [0.0] * len(names)
