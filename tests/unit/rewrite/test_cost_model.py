"""From how many tokens on pruning pays by the cost model: of which layers it speaks, and what moves its answer."""

import math

import pytest
import torch
from transformers import LlamaConfig

import pp_fx
from pp_fx.capture.layers import find_layers
from pp_fx.errors import ConfigError
from pp_fx.rewrite import cost_model
from pp_fx.rewrite.cost_model import COSTS, SMALLEST, STEP, Costs, tokens_that_pay
from pp_fx.runtime.names import LAYER
from tests.helpers.models import tiny_llama

MODEL = {"layers": 1, "heads": 16, "kv_heads": 16, "intermediate": 3072}
"""Of the smallest sizes that the model speaks of: H = 256, C = 3072."""
COST = Costs(call=1e-4, head=1e-6, byte=1e-10, row=1e-9, mac=1e-11)


def guard_of(ratio=0.5, dtype=torch.bfloat16, model=None, **changes):
    """Tokens that the guard of a transformed layer asks for."""
    model = tiny_llama(**{**MODEL, **(model or {})}).to(dtype)
    settings = {"mlp_ratio": ratio, "skip_layers": 0, "round_to": 1, **changes}
    pp_fx.transform(model, settings)
    return find_layers(model)[1][0].__dict__[LAYER].guard_tokens


@pytest.fixture
def known(monkeypatch):
    """Costs in place of those that were measured."""
    monkeypatch.setattr(cost_model, "COSTS", {("cpu", 2): COST})


def test_the_formula(known):
    """Solved by hand, for H = 256 and C = 3072 in bf16, half dropped, two probe rows."""
    weights = 3 * 256 * 3072
    spent = COST.call + COST.byte * 2 * weights * (2 / 3 + 1 / 2) + COST.mac * 2 * weights * 2 / 3
    expected = spent / (COST.mac * weights / 2 - COST.row * 1536)
    found = guard_of()
    assert found % STEP == 0
    assert found - STEP < expected <= found


@pytest.mark.parametrize("costs", COSTS.values())
def test_more_dropped_and_larger_layers_pay_earlier(monkeypatch, costs):
    monkeypatch.setattr(cost_model, "COSTS", {("cpu", 2): costs})
    few, many = guard_of(0.1), guard_of(0.6)
    assert 0 < many < few
    assert guard_of(0.1, model={"intermediate": 6144}) < few


def test_rows_of_the_probe_count(known):
    assert guard_of(probe={"token_fraction": 0.5}) > guard_of()
    paper = {"token_fraction": 0.5, "sample_fraction": 0.05}
    assert guard_of(probe=paper) == guard_of()


def test_what_never_pays_stays_dense_with_a_warning(known):
    with pytest.warns(UserWarning, match=r"layers 0 stay dense.*guard=False"):
        assert guard_of(0.3, probe={"token_fraction": 1.0}) == math.inf


def test_heads_cost_and_save(known):
    mlp, heads = guard_of(0.3), guard_of(0.0, attention_ratio=0.3)
    assert 0 < mlp < guard_of(0.3, attention_ratio=0.3) < heads


@pytest.mark.parametrize(
    "changes",
    [
        {"guard": False},
        {"ratio": 0.0},
        {"ratio": 0.0, "decode_ratio": 0.5},
        {"probe": None},
    ],
    ids=str,
)
def test_nothing_to_judge(known, changes):
    assert guard_of(**changes) == 0


def test_only_what_was_measured(known):
    assert guard_of(dtype=torch.float32) == 0, "no costs of 4 bytes here"
    assert guard_of(model={"intermediate": 96}) == 0, "a small layer"
    model = pp_fx.transform(tiny_llama(**MODEL).to(torch.bfloat16), {"mlp_ratio": 0.5, "skip_layers": 0})
    layer = model.model.layers[0]
    kept = {kind: state.kept_units for kind, state in layer.states().items()}
    settings = layer.pp_layer.settings
    assert tokens_that_pay(layer, layer.groups, kept, settings, "cpu") > 0
    assert tokens_that_pay(layer, layer.groups, kept, settings, "cuda") == 0


def test_models_for_tests_are_too_small_for_it():
    """Nearly all tests of this project prune them at few tokens: none may turn into a test of dense calls."""
    assert sum(p.numel() for p in tiny_llama(layers=1).parameters()) * 8 < SMALLEST
    assert guard_of(model={"intermediate": 96}, dtype=torch.float32) == 0


def test_a_configuration_alone_is_explained_alike():
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
                         num_hidden_layers=1, vocab_size=97)  # fmt: skip
    report = pp_fx.explain(config, {"mlp_ratio": 0.3, "skip_layers": 0}, length=8).layers[0]
    reason = next(r for r in report.dense if r.startswith("guard: calls of fewer than"))
    tokens = int(reason.split()[5])
    assert report.macs.pruned == report.macs.dense
    free = pp_fx.explain(config, {"mlp_ratio": 0.3, "skip_layers": 0, "guard": False}, length=8).layers[0]
    assert free.dense == ()
    assert free.macs.pruned < free.macs.dense
    larger = pp_fx.explain(config, {"mlp_ratio": 0.3, "skip_layers": 0}, length=tokens).layers[0]
    assert larger.macs.pruned < larger.macs.dense


def test_the_flag():
    for guard in (None, True, False):
        config = pp_fx.ProbePruningConfig(guard=guard)
        assert pp_fx.ProbePruningConfig.from_json(config.to_json()) == config
    assert pp_fx.ProbePruningConfig().guard is None
    assert pp_fx.ProbePruningConfig.paper().guard is False, "as published"
    with pytest.raises(ConfigError, match="guard=1 is not a boolean"):
        pp_fx.ProbePruningConfig(guard=1)
