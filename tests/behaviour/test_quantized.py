"""Quantized models pruned: exact at ratio 0, equal to the zeroed original, the same by step, compiled and generated."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import pp_fx
from pp_fx import layouts
from pp_fx.cache import compact_bytes, selections_on
from pp_fx.kernels import strongest
from pp_fx.rewrite.layer import layers_of
from tests.helpers.continuous import one_by_one, serve
from tests.helpers.families import build
from tests.helpers.models import tiny_llama
from tests.helpers.quantized import QUANTIZATIONS, quantized
from tests.helpers.zeroed import PRUNED, assert_equals_zeroed

IDS = torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(3))
every_layout = pytest.mark.parametrize("name", list(QUANTIZATIONS))


def by_step(**changes):
    fields = {"mlp_ratio": 0.0, "decode": "step", "decode_ratio": 0.4, "round_to": 1, "skip_layers": 1}
    return pp_fx.ProbePruningConfig(**{**fields, **changes})


def decoded(model, ids=IDS):
    """Logits of single tokens after a prompt."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 44)], 1)


def assert_near(got, right, tolerance):
    """Of the largest number."""
    torch.testing.assert_close(got, right, rtol=0, atol=tolerance * float(right.abs().max()))


@every_layout
def test_nothing_pruned_is_the_quantized_model_bit_for_bit(name):
    model = quantized(tiny_llama(), name)
    with torch.no_grad():
        expected = model(IDS).logits
        pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0))
        assert torch.equal(model(IDS).logits, expected)
        pp_fx.transform(pp_fx.restore(model), pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1))
        assert not torch.equal(model(IDS).logits, expected)
        assert torch.equal(pp_fx.restore(model)(IDS).logits, expected)


@every_layout
@pytest.mark.parametrize("padded", [False, True])
def test_pruned_equals_the_quantized_model_with_dropped_channels_zeroed(name, padded):
    # where activations are rounded, too, the least difference rounds one of them the other way
    tolerance = 1e-2 if name == "int8, activations too" else 1e-4
    assert_equals_zeroed(quantized(tiny_llama(bias=True), name), IDS[:, :40], padded, tolerance=tolerance)


@pytest.mark.parametrize("family", ["Phi3", "OPT", "Starcoder2", "Falcon"])
def test_other_families(family):
    """Fused projections, MLPs without a gate, biases."""
    model, plain = quantized(build(family), "int8"), build(family)
    config, ids = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=1), IDS % 64
    with torch.no_grad():
        expected = model(ids).logits
        for layer, twin in zip(plain.modules(), model.modules(), strict=True):
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(layouts.widened(twin.weight.detach()))
        pp_fx.transform(plain, config)
        pp_fx.transform(model, config)
        assert_near(model(ids).logits, plain(ids).logits, 1e-4)
        assert_near(decoded(model, ids), decoded(plain, ids), 1e-3)
        assert torch.equal(pp_fx.restore(model)(ids).logits, expected)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param("int8", "sticky", marks=pytest.mark.slow),
        ("int8", "step"),
        pytest.param("float8", "probe", marks=pytest.mark.slow),
    ],
)
def test_generate_compiled_gives_the_same_tokens(name, mode):
    torch._dynamo.reset()
    model = quantized(tiny_llama(layers=2), name)
    changes = {"decode_ratio": 0.4} if mode == "step" else {}
    config = pp_fx.ProbePruningConfig(0.4, skip_layers=1, round_to=1, decode=mode, freeze_history=True, **changes)
    pp_fx.transform(model, config)
    pp_fx.calibrate(model, IDS, progress=False)
    call = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(IDS[:, :40], **call)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(model.generate(IDS[:, :40], **call), plain)


def test_kept_channels_are_those_of_the_model_before():
    model = tiny_llama(intermediate=384)
    twin = quantized(copy.deepcopy(model), "int8")
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.3, skip_layers=1, round_to=1, decode="sticky")
    kept = []
    for one in (model, twin):
        pp_fx.transform(one, config)
        cache = DynamicCache(config=one.config)
        with torch.no_grad():
            one(IDS, past_key_values=cache)
        kept.append([groups["mlp"].kept.tolist() for groups in selections_on(cache).layers.values()])
    for a, b in zip(*kept, strict=True):
        assert len(set(a) & set(b)) >= 0.98 * len(a)


def test_compact_weights_stay_quantized():
    """A byte for a weight, the correction beside them; a second prompt goes into the same memory."""
    model = pp_fx.transform(quantized(tiny_llama(), "int8"), PRUNED)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :40], past_key_values=cache)
    held = selections_on(cache).layers[1]["mlp"]
    assert [type(linear.weight).__name__ for linear, _ in held.inputs] == ["Int8Tensor", "Int8Tensor"]
    assert held.output.weight.qdata.shape == (64, len(held.kept))
    assert held.compensation is not None
    numbers = sum(
        3 * 64 * len(groups["mlp"].kept) + 2 * 64 * 16 * len(groups["attention"].kept)
        for groups in selections_on(cache).layers.values()
    )
    assert numbers < compact_bytes(cache) < 1.3 * numbers
    address = held.output.weight.qdata.data_ptr()
    pp_fx.cache.forget(cache)
    cache.crop(0)
    with torch.no_grad():
        model(IDS.flip(1)[:, :40], past_key_values=cache)
    assert held.output.weight.qdata.data_ptr() == address


@every_layout
def test_a_step_is_the_strongest_channels_of_each_token(name, monkeypatch):
    model = quantized(tiny_llama(), name)
    expected = copy.deepcopy(model)
    for layer in expected.model.layers:
        layer.mlp.forward = _strongest(layer.mlp)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pp_fx.transform(model, by_step())
    slow = [str(one.message) for one in said if "take the dense model's time" in str(one.message)]
    assert len(slow) == (name == "float8")
    assert all(type(model.model.layers[0].mlp.up_proj.weight).__name__ in one for one in slow)
    served = []
    monkeypatch.setattr(strongest, "strongest", _counted(strongest.strongest, served))
    got, right = decoded(model), decoded(expected)
    # kernels multiply with the numbers as they are where the library rounds the activations, too
    tolerance = 0.1 if name == "int8, activations too" else 1e-4
    assert_near(got, right, tolerance)
    assert bool(served) == (name != "float8")


def _counted(function, calls):
    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return counted


def _strongest(mlp):
    norms = layouts.widened(mlp.down_proj.weight.detach()).float().norm(dim=0)

    def forward(x):
        gate = F.silu(mlp.gate_proj(x))
        z = gate * mlp.up_proj(x)
        if x.shape[1] < 32:
            order = (gate.abs() * norms).argsort(-1, descending=True)
            z = z * torch.zeros_like(z).scatter(-1, order[..., : 96 - int(0.4 * 96)], 1.0)
        return mlp.down_proj(z)

    return forward


@pytest.mark.parametrize("mode", ["sticky", "step"])
def test_a_model_that_was_cast_keeps_the_dtype_of_its_weights(mode):
    """bf16 when it was quantized, fp32 around the weights afterwards: least squares and steps meet both."""
    model = quantized(tiny_llama().bfloat16(), "int8")
    changes = {"compensation_min_tokens": 10, "freeze_history": True}
    config = pp_fx.ProbePruningConfig(0.4, skip_layers=1, round_to=1, decode=mode, **changes)
    pp_fx.transform(model, config)
    pp_fx.calibrate(model, IDS, progress=False)
    rounded = decoded(model)
    model.float()
    found = decoded(model)
    assert (rounded.dtype, found.dtype) == (torch.bfloat16, torch.float32)
    assert float((found - rounded.float()).abs().mean() / found.abs().mean()) < 0.1


def test_weights_of_several_kinds_in_one_mlp():
    """The output projection left as it was, as many recipes do."""
    model = quantized(tiny_llama(), "int8", lambda path: not path.endswith("down_proj"))
    assert_equals_zeroed(copy.deepcopy(model), IDS[:, :40], False)
    expected = copy.deepcopy(model)
    for layer in expected.model.layers:
        layer.mlp.forward = _strongest(layer.mlp)
    pp_fx.transform(model, by_step())
    assert_near(decoded(model), decoded(expected), 1e-4)


@every_layout
def test_a_probe_of_fewer_bits_ranks_for_a_quantized_gate(name):
    model = pp_fx.transform(quantized(tiny_llama(), name), by_step(step_probe="int8"))
    twin = pp_fx.transform(quantized(tiny_llama(), name), by_step())
    right = decoded(twin)
    assert float((decoded(model) - right).abs().mean() / right.abs().mean()) < 0.1
    assert layers_of(model)[1].states()["mlp"].coded is not None


@every_layout
def test_copies_and_state_dicts(name, tmp_path):
    model = pp_fx.transform(quantized(tiny_llama(), name), PRUNED)
    pp_fx.calibrate(model, IDS, progress=False)
    with torch.no_grad(), pp_fx.history_frozen(model):
        expected = model(IDS).logits
        assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)
    other = pp_fx.transform(quantized(tiny_llama(seed=4), name), PRUNED)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=False))
    pp_fx.calibrate(other, IDS, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, expected)


@pytest.mark.parametrize("name", ["int8", pytest.param("float8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("decode", "alike"), [("rolling", "sticky"), ("step", "step")])
def test_an_engine_decodes_as_generate(name, decode, alike):
    """A frozen history keeps one selection for ever, as a generation does."""
    fields = {"mlp_ratio": 0.4, "skip_layers": 1, "round_to": 16, "probe": None, "mlp_compensation": "mean"}
    wanted, models = [(IDS[0, : 32 + n].tolist(), 6) for n in (0, 5, 9)], []
    for one in (decode, alike):
        model = pp_fx.transform(quantized(tiny_llama(), name), pp_fx.ProbePruningConfig(**fields, decode=one))
        models.append(pp_fx.calibrate(model, IDS[:, :40], progress=False))
    assert [tokens for tokens, _ in serve(models[0], wanted)] == one_by_one(models[1], wanted)
