"""Tokens that decode under transformers' continuous batching, beside `generate` and plain models."""

import copy

import pytest
import torch
import torch.nn.functional as F

import pp_fx
from pp_fx.capture.calls import record_calls
from pp_fx.rewrite.layer import layers_of
from pp_fx.rewrite.verify import random_call
from pp_fx.runtime.engine_step import ALL_DENSE, EngineStep
from pp_fx.runtime.names import STEP
from tests.helpers.continuous import assert_same, one_by_one, prompt_tokens, requests, serve
from tests.helpers.families import FAMILIES, build
from tests.helpers.models import tiny_llama
from tests.helpers.zeroed import transformed

LONG = pytest.mark.slow


def by_step(**changes):
    fields = {"mlp_ratio": 0.0, "decode": "step", "decode_ratio": 0.5, "round_to": 1, "skip_layers": 1}
    return pp_fx.ProbePruningConfig(**{**fields, **changes})


def whole_prompts(count, seed, shortest=32):
    """Prompts of at least `shortest` tokens: `generate` lets the tokens of shorter ones choose for themselves, too."""
    return [(prompt + [5] * max(0, shortest - len(prompt)), tokens) for prompt, tokens in requests(count, seed)]


class ChoosingOracle:
    """A stock Llama of which every token that decodes keeps the strongest channels by its own gate."""

    def __init__(self, model, ratio):
        self.mixed = 0
        model.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for layer in model.model.layers:
            layer.mlp.forward = self._forward(layer.mlp, ratio)

    def _begin(self, module, args, kwargs):
        prompts = prompt_tokens(kwargs["cu_seq_lens_q"].tolist())
        self.decodes = torch.ones(kwargs["position_ids"].shape[1], dtype=torch.bool)
        self.decodes[prompts] = False
        self.mixed += 0 < len(prompts) < len(self.decodes)

    def _forward(self, mlp, ratio):
        channels = mlp.down_proj.in_features

        def forward(x):
            gate = F.silu(mlp.gate_proj(x))
            strength = gate.abs() * mlp.down_proj.weight.norm(dim=0)
            kept = strength.argsort(-1, descending=True)[..., : channels - int(ratio * channels)]
            mask = torch.zeros_like(gate).scatter(-1, kept, 1.0)
            return mlp.down_proj(gate * mlp.up_proj(x) * torch.where(self.decodes[None, :, None], mask, 1.0))

        return forward


@pytest.mark.parametrize("changes", [{"decode_ratio": 0.0}, {"decode_ratio": None}])
def test_without_a_ratio_it_is_generate(changes):
    model, wanted = tiny_llama(), requests(12, seed=17)
    expected = one_by_one(model, wanted)
    pp_fx.transform(model, by_step(**changes))
    assert [tokens for tokens, _ in serve(model, wanted)] == expected


@pytest.mark.parametrize("batch", [128, 37])
def test_every_token_chooses_for_itself(batch):
    """More and fewer decoding tokens than the kernels run, beside prompts of all lengths and alone."""
    original = tiny_llama()
    model, wanted = pp_fx.transform(copy.deepcopy(original), by_step()), requests(14, seed=19)
    oracle = ChoosingOracle(original, 0.5)
    assert_same(serve(model, wanted, max_batch_tokens=batch), serve(original, wanted, max_batch_tokens=batch))
    assert oracle.mixed


@pytest.mark.parametrize(
    ("count", "changes"), [(10, {}), (10, {"step_probe": "int8"}), pytest.param(100, {}, marks=LONG)]
)
def test_in_company_it_is_generate_of_each_request(count, changes):
    model, wanted = pp_fx.transform(tiny_llama(), by_step(**changes)), whole_prompts(count, seed=23)
    expected = one_by_one(model, wanted)
    assert [tokens for tokens, _ in serve(model, wanted, max_batch_tokens=1024)] == expected
    dense = one_by_one(pp_fx.restore(model), wanted)
    assert dense != expected  # else this shows nothing


def test_prompts_are_pruned_beside_it():
    """By a frozen history, so that a request's results are its own."""
    model, wanted = tiny_llama(), whole_prompts(10, seed=29)
    pp_fx.transform(model, by_step(mlp_ratio=0.4, probe=None, mlp_compensation="mean"))
    pp_fx.calibrate(model, torch.arange(2, 82).view(2, 40), progress=False)
    alone = serve(model, wanted, together=False)
    assert_same(serve(model, wanted, max_batch_tokens=256), alone)
    assert [tokens for tokens, _ in alone] == one_by_one(model, wanted)


@pytest.mark.parametrize("family", [f if f in ("Llama", "OPT", "Phi3", "GPT-2") else pytest.param(f, marks=LONG)
                                    for f in FAMILIES])  # fmt: skip
@pytest.mark.parametrize("prunes", [False, True])
def test_a_layer_taken_apart(family, prunes):
    """The tokens that decode as if all did, the prompts' as if none did."""
    config = by_step(mlp_ratio=0.4, skip_layers=0, probe=None)
    model = transformed(build(family), config)
    layers = layers_of(model)
    calls = record_calls(model, layers, 1, 9)
    prompts, others = torch.tensor([1, 2, 3, 7]), torch.tensor([0, 4, 5, 6, 8])
    for layer, call in zip(layers, calls, strict=True):
        state = layer.states().get("mlp")
        if state is None:
            continue
        draw = torch.Generator().manual_seed(0)
        state.energy.copy_(torch.rand(state.energy.shape, generator=draw))
        state.seen.fill_(1)
        state.calibrated = True

        def run(step, layer=layer, call=call):
            args, kwargs = random_call(layer, call, None)
            with torch.no_grad():
                out = layer.forward(*args, **kwargs, **{STEP: step})
            return (out if isinstance(out, torch.Tensor) else out[0])[0]

        apart = run(EngineStep(prompts, others, prunes, "step"))
        decoded, whole = run(EngineStep(decode="step")), run(EngineStep(prunes=True) if prunes else ALL_DENSE)
        assert not torch.allclose(decoded, whole)
        scale = whole.abs().max()
        torch.testing.assert_close(apart[prompts] / scale, whole[prompts] / scale, atol=1e-5, rtol=0)
        torch.testing.assert_close(apart[others] / scale, decoded[others] / scale, atol=1e-5, rtol=0)
