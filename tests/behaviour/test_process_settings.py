"""What torch has set for the whole process reaches nothing that pp_fx makes, and no call."""

import contextlib
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import pp_fx
from pp_fx.rewrite.layer import layers_of
from pp_fx.runtime.compensate import compensate
from pp_fx.runtime.head_gram import probe_gram
from pp_fx.runtime.plan import Plan
from pp_fx.runtime.probe import ProbeRows
from pp_fx.runtime.selections import Selection
from pp_fx.runtime.state import states_of
from tests.helpers.models import calibrated_llama, tiny_llama

CONFIG = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, attention_ratio=0.3, skip_layers=1, round_to=1, compensation_min_tokens=32
)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "fp64": lambda: default_dtype(torch.float64),
    "bf16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "meta as a context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}


def contents(model):
    return {f"{i}.{n}": b for i, s in enumerate(states_of(model)) for n, b in s.named_buffers()}


def assert_same_state(model, expected):
    found = contents(model)
    assert found.keys() == expected.keys()
    for name, buffer in found.items():
        assert not buffer.is_inference()
        assert not buffer.requires_grad
        torch.testing.assert_close(buffer, expected[name], atol=1e-5, rtol=1e-4, msg=name)  # dtype and device, too


def logits(model, ids):
    with torch.no_grad(), pp_fx.history_frozen(model):
        return model(ids).logits


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_made_under_a_setting_is_what_is_made_without_it(name, ids, tmp_path):
    plain = pp_fx.transform(tiny_llama(), CONFIG)
    fresh = {k: v.clone() for k, v in contents(plain).items()}
    pp_fx.calibrate(plain, ids, progress=False)
    model = tiny_llama()
    with SETTINGS[name]():
        pp_fx.transform(model, CONFIG)
    assert_same_state(model, fresh)
    with SETTINGS[name]():
        pp_fx.calibrate(model, ids, progress=False)
        model.save_pretrained(tmp_path)
        told = pp_fx.explain(model)
    assert_same_state(model, contents(plain))
    assert str(told) == str(pp_fx.explain(plain))
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), atol=1e-4, rtol=1e-4)
    if "meta" not in name:  # transformers refuses to load there
        with SETTINGS[name]():
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert_same_state(loaded, contents(plain))
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters())
    with SETTINGS[name]():
        pp_fx.restore(model)
    assert not pp_fx.is_transformed(model)


@pytest.mark.parametrize("name", [n for n in SETTINGS if "meta" not in n])
def test_calls_under_a_setting(name, ids):
    """Padded, so that every branch of the statistics runs; under autocast the products are bf16, as the dense ones."""
    model = calibrated_llama(CONFIG)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad(), pp_fx.history_frozen(model):
        expected = model(ids, attention_mask=mask).logits
        with SETTINGS[name]():
            got = model(ids, attention_mask=mask).logits
            model.generate(ids, attention_mask=mask, max_new_tokens=3)
    if name != "autocast":
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("least_squares", [True, False])
def test_autocast_does_not_reach_a_correction(least_squares):
    """Two calls of one function with the same fp32 numbers."""
    config = dataclasses.replace(CONFIG, compensation_min_tokens=1 if least_squares else 1000)
    layer = layers_of(calibrated_llama(config))[-1]
    state, weight = layer.states()["mlp"], layer.mlp.down_proj.weight
    kept = torch.arange(state.kept_units)

    def corrected():
        made = compensate(state, Selection(kept, kept, 0), rows_of(96), ROWS, weight, PLAN._replace(settings=config))
        return [made.vector, *(made.correction or ())]

    expected = corrected()
    with torch.autocast("cpu", torch.bfloat16):
        got = corrected()
    assert len(got) == len(expected)
    assert (len(got) > 1) == least_squares
    assert all(map(torch.equal, got, expected))


def test_autocast_does_not_reach_the_score_of_heads():
    layer = layers_of(calibrated_llama(CONFIG))[-1]
    state, weight = layer.states()["attention"], layer.self_attn.o_proj.weight
    expected = probe_gram(state, rows_of(64), ROWS, rows_of(64), weight, PLAN)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(probe_gram(state, rows_of(64), ROWS, rows_of(64), weight, PLAN), expected)


ROWS, PLAN = ProbeRows(None, torch.arange(20), None), Plan((2, 20), pp_fx.ProbePruningConfig(), True, False, None, {})


def rows_of(width):
    return torch.randn(2, 20, width, generator=torch.Generator().manual_seed(0))
