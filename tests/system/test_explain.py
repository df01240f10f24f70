"""explain(): from a model, a transformed model and a configuration alone; and blocks that nobody has seen."""

import json

import pytest
import torch
from transformers import BertConfig, LlamaConfig, OPTConfig

import pp_fx
from pp_fx.errors import InputError, UnsupportedModelError
from pp_fx.macs import count_macs
from tests.helpers.command import run
from tests.helpers.families import FAMILIES
from tests.helpers.models import tiny_llama

CONFIG = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1)


def test_model_transformed_model_and_configuration_agree(llama):
    before = pp_fx.explain(llama, CONFIG, batch=3, length=40)
    assert not pp_fx.is_transformed(llama)
    from_config = pp_fx.explain(llama.config, CONFIG, batch=3, length=40)
    pp_fx.transform(llama, CONFIG)
    after = pp_fx.explain(llama, batch=3, length=40)
    assert before == after
    assert before.layers == from_config.layers
    assert after.macs == count_macs(llama, 3, 40)
    kept = [{g.kind: g.kept for g in layer.groups} for layer in after.layers]
    assert kept == [{k: s.kept_units for k, s in layer.states().items()} for layer in llama.model.layers]


def test_groups_name_their_projections_and_heads(llama):
    attention, mlp = pp_fx.explain(llama, CONFIG).layers[2].groups
    assert (mlp.inputs, mlp.output, mlp.units) == (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", 96)
    assert (attention.inputs, attention.output) == (("self_attn.q_proj",), "self_attn.o_proj")
    assert attention.kv_head == (0, 0, 1, 1)


def test_a_configuration_of_any_size_needs_no_weights():
    huge = LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                       intermediate_size=28672)  # fmt: skip
    found = pp_fx.explain(huge)
    assert len(found.layers) == 80
    assert found.layers[79].groups[1].units == 28672
    assert 0.83 < found.macs.pruned / found.macs.dense < 0.84
    opt = pp_fx.explain(OPTConfig(), pp_fx.ProbePruningConfig(0.4, 0.2, skip_layers=3)).layers[-1].groups
    assert [(g.kind, g.kept, g.units) for g in opt] == [("attention", 9, 12), ("mlp", 1440, 3072)]


def test_what_stays_dense_comes_with_its_reason():
    found = pp_fx.explain(FAMILIES["Bloom"].config(), CONFIG)
    assert [g.kind for g in found.layers[0].groups] == ["mlp"]
    assert any("self_attention: runs as the module it is" in reason for reason in found.layers[0].dense)
    json.dumps(found.to_dict())


def test_a_query_that_runs_whole_comes_with_its_reason():
    found = pp_fx.explain(FAMILIES["OLMo2"].config(), CONFIG)
    attention = next(g for g in found.layers[0].groups if g.kind == "attention")
    assert (attention.inputs, attention.output) == ((), "self_attn.o_proj")
    assert any("self_attn.o_proj: the query projection runs whole" in reason for reason in found.layers[0].dense)
    assert "number of heads" in str(found).replace("\n", " ")


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("length", -1), ("length", 2.5)])
def test_bad_numbers_are_refused(llama, name, value):
    with pytest.raises(InputError, match=f"{name}={value}"):
        pp_fx.explain(llama, CONFIG, **{name: value})


def test_a_token_is_charged_for_the_experts_that_it_runs():
    config = FAMILIES["Mixtral"].config()  # 4 experts, 2 a token
    attention, router, experts = 2 * 64 * 64 + 2 * 32 * 64, 4 * 64, 2 * 3 * 64 * 96
    assert pp_fx.explain(config, CONFIG).layers[0].macs.dense == attention + router + experts


def test_the_table_joins_equal_layers():
    text = str(pp_fx.explain(tiny_llama(layers=6), CONFIG))
    assert "1-5" in text
    assert "self_attn.q_proj" in text


def test_a_configuration_without_decoder_is_refused():
    with pytest.raises(UnsupportedModelError, match="Bert"):
        pp_fx.explain(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))


def test_the_command_prints_a_table_or_json(folder):
    shown = run("explain", folder, "--mlp-ratio", "0.2")
    assert shown.exit_code == 0, shown.output
    assert "LlamaForCausalLM" in shown.output
    data = json.loads(run("explain", folder, "--mlp-ratio", "0.2", "--json", "-").stdout)
    assert len(data["layers"]) == 5
    assert data["layers"][4]["groups"][1]["kept"] < 96
    assert data["macs"]["pruned"] < data["macs"]["dense"]


def test_nothing_is_changed(llama, ids):
    with torch.no_grad():
        dense = llama(ids).logits
        pp_fx.explain(llama, CONFIG)
        assert torch.equal(llama(ids).logits, dense)
    assert not pp_fx.is_transformed(llama)


def test_fused_layers_count_the_same_macs_as_separate_ones():
    fused, separate = (pp_fx.explain(FAMILIES[name].config(), CONFIG).macs for name in ("Phi3", "Llama"))
    assert (fused.dense, fused.pruned, fused.probe) == pytest.approx((separate.dense, separate.pruned, separate.probe))


def test_a_transformed_model_is_explained_by_its_own_configuration(llama):
    pp_fx.transform(llama, pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=1))
    with pytest.raises(pp_fx.errors.InputError, match="leave config out"):
        pp_fx.explain(llama, pp_fx.ProbePruningConfig(mlp_ratio=0.1))
    with pytest.raises(pp_fx.errors.StateError, match="model is transformed"):
        pp_fx.compare(llama, torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long))
