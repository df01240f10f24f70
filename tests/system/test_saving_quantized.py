"""Quantized and pruned through one folder: transformers' own quantizer within ours."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

import pp_fx
from pp_fx.errors import ConfigError, ExportError, StateError
from tests.helpers.models import tiny_llama
from tests.helpers.quantized import QUANTIZATIONS, quantized
from tests.helpers.zeroed import PRUNED

IDS = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(3))


def int8():
    return TorchAoConfig(QUANTIZATIONS["int8"]())


@pytest.fixture
def dense(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def logits(model):
    with torch.no_grad(), pp_fx.history_frozen(model):
        return model(IDS).logits


def test_a_model_is_quantized_pruned_saved_and_loaded(dense, tmp_path):
    both = pp_fx.ProbePruningHfConfig(PRUNED, quantization=int8())
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=both)
    pp_fx.calibrate(model, IDS, progress=False)
    model.save_pretrained(tmp_path / "both")
    assert isinstance(model.config.quantization_config, TorchAoConfig)
    written = json.loads((tmp_path / "both" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "pp_fx"
    assert written["quantization"]["quant_method"] == "torchao"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert type(again.model.layers[1].mlp.up_proj.weight).__name__ == "Int8Tensor"
    assert again.model.layers[1].pp_mlp.calibrated
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_a_model_that_was_quantized_before(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=int8())
    whole = logits(model)
    pp_fx.transform(model, PRUNED).save_pretrained(tmp_path / "both")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    assert torch.equal(logits(pp_fx.restore(again)), whole)


def test_a_folder_for_other_tools_holds_the_quantized_model(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=int8())
    whole = logits(model)
    pp_fx.transform(model, PRUNED).save_pretrained(tmp_path / "apart", quantization_config=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "apart")
    assert not pp_fx.is_transformed(again)
    assert torch.equal(logits(again), whole)
    pp_fx.transform(again, pp_fx.ProbePruningHfConfig.from_pretrained(tmp_path / "apart").config)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [pp_fx.ProbePruningHfConfig(PRUNED), "int8"])
def test_what_is_no_quantization_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"quantization={type(wrong).__name__} quantizes nothing"):
        pp_fx.ProbePruningHfConfig(PRUNED, quantization=wrong)


def test_weights_quantized_in_place_cannot_be_saved(tmp_path):
    model = pp_fx.transform(quantized(tiny_llama(), "int8"), PRUNED)
    with pytest.raises(StateError, match=r"q_proj\.weight was quantized in place.*TorchAoConfig"):
        model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_there_is_no_onnx_form(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=int8())
    with pytest.raises(ExportError, match=r"q_proj\.weight is quantized"):
        pp_fx.export.onnx(pp_fx.transform(model, PRUNED), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
