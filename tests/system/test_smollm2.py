"""The real model: exact when nothing is dropped, equal to the reference, and the perplexities that we promise."""

import copy
import os
from pathlib import Path

import pytest
import torch

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.evaluate import evaluate
from pp_fx.macs import count_macs
from pp_fx.measure.bytes import state_bytes, weight_bytes
from pp_fx.text import read, sequences
from tests.helpers.reference_for import reference_for

WIKITEXT = os.environ.get("PP_FX_TEXT_DIR", "")


def test_ratio_zero_is_exact_and_generates_the_same(smollm2):
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    ids = sequences(read("python-docs"), tokenizer, 2, 64)
    with torch.no_grad():
        dense = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0))
        assert torch.equal(model(ids).logits, dense)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), tokens)


def test_the_graphs_match_the_reference_on_real_weights(smollm2):
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=0.2, skip_layers=3, decode="sticky")
    ids = sequences(read("python-docs"), tokenizer, 2, 64)
    reference = reference_for(model, config)
    pp_fx.transform(model, config)
    expected = reference.forward(ids)
    with torch.no_grad():
        got = model(ids, use_cache=True)
    layers = selections_on(got.past_key_values).layers
    wrong = {
        (layer, kind)
        for (layer, kind), kept in expected.kept.items()
        if not torch.equal(layers[layer][kind].kept, kept)
    }
    # a near-tie may fall either way; then everything after it differs
    assert not wrong or expected.gap < 1e-4
    if not wrong:
        torch.testing.assert_close(got.logits, expected.logits, atol=5e-3, rtol=1e-4)


def test_default_configuration_costs_little(smollm2):
    model = copy.deepcopy(smollm2[0])
    pp_fx.transform(model)
    assert state_bytes(model) <= 0.02 * weight_bytes(model)
    macs = count_macs(model, 20, 512)
    assert macs.probe / macs.dense < 0.03
    assert 0.84 < macs.ideal < 0.86


@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT, reason="set PP_FX_TEXT_DIR to a folder with valid.txt and test.txt of WikiText-2")
@pytest.mark.parametrize(
    ("config", "calibration", "low", "high"),
    [
        (pp_fx.ProbePruningConfig(), "valid", 40.5, 43),
        (pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=3), "valid", 45, 48.5),
        (pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=3), "python-docs", 47, 54),
        (pp_fx.ProbePruningConfig.paper(0.4, 0.0, round_to=1), "valid", 59.6 * 0.95, 59.6 * 1.05),
        (pp_fx.ProbePruningConfig.paper(0.4, round_to=1), "valid", 80.6 * 0.95, 80.6 * 1.05),
    ],
)
def test_perplexity_of_the_standard_protocol(smollm2, config, calibration, low, high):
    model, tokenizer = copy.deepcopy(smollm2[0]).to(torch.bfloat16), smollm2[1]
    test = sequences(read(str(Path(WIKITEXT, "test.txt"))), tokenizer, 20, 512)
    name = calibration if calibration == "python-docs" else str(Path(WIKITEXT, f"{calibration}.txt"))
    pp_fx.transform(model, config)
    pp_fx.calibrate(model, sequences(read(name), tokenizer, 64, 512), progress=False)
    assert low <= evaluate(model, test, 20).ppl <= high


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_export_agrees_at_real_sizes(smollm2, tmp_path, weights):
    """The default comparison passes: at these sizes some steps have near-ties, which fall otherwise in onnxruntime."""
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    pp_fx.transform(model)
    pp_fx.calibrate(model, sequences(read("python-docs"), tokenizer, 2, 128), progress=False)
    pp_fx.export.onnx(model, tmp_path / "out", weights=weights)
    check = pp_fx.export.check(tmp_path / "out")
    assert check.passed
    assert check.difference < 1e-4
