"""Models that are more than their weights: LoRA adapters, quantized weights."""

import warnings

import pytest
import torch

import pp_fx
from pp_fx.errors import UnsupportedModelError
from pp_fx.rewrite.layer import layers_of
from tests.helpers.models import tiny_llama
from tests.helpers.zeroed import PRUNED, transformed

EXACT = pp_fx.ProbePruningConfig(mlp_ratio=0.0, skip_layers=0)


def adapted(*targets):
    """A LoRA-adapted model, with adapters that do something."""
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft reads an attribute that transformers renames
        return peft.get_peft_model(tiny_llama(), config).eval()


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("gate_proj", "down_proj")])
def test_an_adapted_model_is_exact_at_ratio_zero(targets, ids):
    model = adapted(*targets)
    with torch.no_grad():
        dense = model(ids).logits
        assert torch.equal(transformed(model, EXACT)(ids).logits, dense)


def test_adapted_attention_leaves_the_query_whole_and_prunes_the_rest():
    model = transformed(adapted("q_proj", "v_proj"), PRUNED)
    layer = layers_of(model)[-1]
    assert {kind: s.units for kind, s in layer.states().items()} == {"attention": 4, "mlp": 96}
    assert layer.groups["attention"].inputs == ()
    assert any("the query projection runs whole" in reason for reason in layer.reasons)


def test_an_adapted_mlp_is_left_dense_with_the_remedy():
    with pytest.warns(UserWarning, match=r"leaves mlp dense.*merge_and_unload"):
        model = pp_fx.transform(adapted("gate_proj", "down_proj"), PRUNED)
    assert set(layers_of(model)[-1].states()) == {"attention"}


def test_a_merged_adapter_is_an_ordinary_model():
    model = transformed(adapted("gate_proj", "down_proj").merge_and_unload(), PRUNED)
    assert layers_of(model)[-1].reasons == []


def test_quantized_weights_are_refused_by_name(ids):
    quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    model = tiny_llama()
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    with torch.no_grad():
        dense = model(ids).logits
        with pytest.raises(UnsupportedModelError, match=r"q_proj\.weight .* WeightQBytesTensor, .*IntxWeightOnly"):
            pp_fx.transform(model, PRUNED)
        assert torch.equal(model(ids).logits, dense)
