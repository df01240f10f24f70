"""Tokens that decode under transformers' continuous batching, beside `generate` and plain models."""

import copy
import dataclasses
import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from transformers import ContinuousBatchingConfig, GenerationConfig

import pp_fx
from pp_fx.cache import compact_bytes, selections_on
from pp_fx.capture.calls import record_calls
from pp_fx.errors import ConfigError, StateError
from pp_fx.rewrite.engine_calls import check_compilation
from pp_fx.rewrite.layer import layers_of, settings_of
from pp_fx.rewrite.verify import random_call
from pp_fx.runtime.engine_step import ALL_DENSE, EngineStep
from pp_fx.runtime.names import STEP
from tests.helpers.continuous import (
    GREEDY,
    SMALL,
    FrozenOracle,
    assert_same,
    one_by_one,
    prompt_tokens,
    requests,
    serve,
    without_collection,
)
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


ROLLING = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, skip_layers=1, round_to=1, decode="rolling", reprobe_every=5, history=None, mlp_compensation=None,
    min_select_tokens=24,
)  # fmt: skip


class RollingOracle:
    """A stock Llama whose tokens of prompts keep the channels that their step's probe chooses, without a history.

    Those that decode keep what the last `reprobe_every` of them choose, asked after so many steps; at first what the
    first pruned step has chosen.

    Attributes:
        chosen: of every choice for tokens that decode the share that the one before had, too; in the order of layers.
        mixed: how many steps ran both kinds of tokens while there was a selection.
    """

    def __init__(self, model, config):
        self.config, self.age, self.mixed, self.chosen = config, 0, 0, []
        self.kept, self.window = {}, {}
        model.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for i, layer in enumerate(model.model.layers):
            if i >= config.skip_layers:
                layer.mlp.register_forward_hook(functools.partial(self._mlp, i, len(model.model.layers)))

    def _begin(self, module, args, kwargs):
        prompts = prompt_tokens(kwargs["cu_seq_lens_q"].tolist())
        count = kwargs["position_ids"].shape[1]
        self.prompts = torch.tensor(prompts, dtype=torch.int64)
        self.others = torch.tensor([t for t in range(count) if t not in set(prompts)], dtype=torch.int64)
        self.age += len(self.others) > 0
        self.due = self.age == self.config.reprobe_every
        self.age = 0 if self.due else self.age
        self.mixed += bool(self.kept) and len(prompts) > 0 and len(self.others) > 0

    def _state(self, mlp, x):
        return F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)

    def _choose(self, mlp, x, layers):
        channels = mlp.down_proj.in_features
        count = channels - int(channels * 0.4 * layers / (layers - self.config.skip_layers))
        energy = self._state(mlp, x).square().mean(0)
        return (energy * mlp.down_proj.weight.square().norm(dim=0)).topk(count).indices

    def _mlp(self, i, layers, mlp, args, out):
        x, out = args[0][0], out[0].clone()

        def run(places, kept):
            mask = torch.zeros(mlp.down_proj.in_features).index_fill(0, kept, 1)
            out[places] = mlp.down_proj(self._state(mlp, x[places]) * mask)

        if len(self.others):
            size = self.config.reprobe_every
            self.window[i] = torch.cat([self.window.get(i, torch.zeros(size, x.shape[1])), x[self.others]])[-size:]
            if self.due:
                found, old = self._choose(mlp, self.window[i], layers), self.kept.get(i)
                share = 0.0 if old is None else torch.isin(found, old).float().mean().item()
                self.chosen.append(share)
                if share < (2.0 if self.config.drift_threshold is None else self.config.drift_threshold):
                    self.kept[i] = found
        if len(self.prompts) >= self.config.min_select_tokens:
            count = self.config.probe.positions(len(self.prompts))
            rows = self.prompts[(2 * torch.arange(count) + 1) * len(self.prompts) // (2 * count)]
            kept = self._choose(mlp, x[rows], layers)
            run(self.prompts, kept)
            self.kept.setdefault(i, kept)
        if len(self.others) and i in self.kept:
            run(self.others, self.kept[i])
        return out[None]


@pytest.mark.parametrize("changes", [{}, {"drift_threshold": 0.5}, {"compact_megabytes": 0}, {"drift_threshold": 0.0}])
def test_decoding_tokens_share_a_selection_that_follows_them(changes):
    """Beside prompts and alone; a new engine starts anew."""
    original, config = tiny_llama(), dataclasses.replace(ROLLING, **changes)
    model, wanted = pp_fx.transform(copy.deepcopy(original), config), [([7], 6), *requests(14, seed=31)]
    oracle = RollingOracle(copy_ := copy.deepcopy(original), config)
    expected = serve(copy_, wanted, max_batch_tokens=48)
    assert_same(serve(model, wanted, max_batch_tokens=48), expected)
    assert_same(serve(model, wanted, max_batch_tokens=48), expected)
    assert oracle.mixed
    assert len(oracle.chosen) >= 6
    if "drift_threshold" in changes:
        stays = [share >= changes["drift_threshold"] for share in oracle.chosen]
        assert all(stays) if changes["drift_threshold"] == 0 else len(set(stays)) == 2
    else:
        assert min(oracle.chosen) < 0.9


@pytest.mark.parametrize("shortest", [3, 40])
def test_the_first_selection(shortest):
    """A prompt's, or where none was long enough that of the first tokens that decoded; what comes after reads it."""
    original = tiny_llama()
    model, wanted = pp_fx.transform(copy.deepcopy(original), ROLLING), [([*range(2, 2 + shortest)], 9), ([7, 8, 9], 3)]
    oracle = RollingOracle(original, ROLLING)
    assert_same(serve(model, wanted, together=False), serve(original, wanted, together=False))
    first, later = oracle.chosen[:2], oracle.chosen[2:]
    assert (first == [0.0, 0.0]) == (shortest < ROLLING.min_select_tokens)
    assert len(later) == 2


def test_padding_does_not_decode():
    model, wanted = pp_fx.transform(tiny_llama(), ROLLING), requests(12, seed=37)
    assert_same(serve(model, wanted, padded=True), serve(model, wanted))


class AllByHistory(FrozenOracle):
    """All tokens run the channels that the history has chosen."""

    def _begin(self, module, args, kwargs):
        super()._begin(module, args, kwargs)
        self.pruned = list(range(kwargs["position_ids"].shape[1]))


@pytest.mark.parametrize("changes", [{"probe": None}, {"freeze_history": True}])
@pytest.mark.parametrize("compensation", ["mean", "least_squares"])
def test_a_frozen_history_decodes_by_its_own_selection(changes, compensation):
    """It is never replaced, and company does not matter."""
    config = dataclasses.replace(ROLLING, history="channel", mlp_compensation=compensation, **changes)
    original, wanted = tiny_llama(), requests(12, seed=41)
    model = pp_fx.transform(copy.deepcopy(original), config)
    pp_fx.calibrate(model, torch.arange(2, 82).view(2, 40), progress=False)
    company = serve(model, wanted, max_batch_tokens=64)
    assert_same(serve(model, wanted, together=False), company)
    if compensation == "mean":
        known = {i: (s.energy, s.mean) for i, s in enumerate(layer.states()["mlp"] for layer in layers_of(model))}
        AllByHistory(original, dataclasses.replace(config, probe=pp_fx.ProbeConfig()), known)
        assert_same(company, serve(original, wanted, max_batch_tokens=64))


def test_a_calibrated_history_is_the_first_to_choose():
    """And the compensation, made for all tokens to come, is in the compact weights."""
    config = dataclasses.replace(ROLLING, history="channel", mlp_compensation="mean", reprobe_every=1000)
    frozen = dataclasses.replace(config, freeze_history=True, min_select_tokens=1000)
    wanted, found = [([7, 8], 8), ([5], 9)], []
    for one in (config, frozen):
        model = pp_fx.transform(tiny_llama(), one)
        pp_fx.calibrate(model, torch.arange(2, 82).view(2, 40), progress=False)
        found.append(serve(model, wanted))
    assert found[0][1] == found[1][1]  # a prompt of one token decodes; the other's is pruned where it is frozen


def test_its_memory_stays_where_it_is():
    config = dataclasses.replace(ROLLING, history="channel", mlp_compensation="least_squares")
    model, places, sizes = pp_fx.transform(tiny_llama(), config), [], []
    model.generation_config = GenerationConfig(max_new_tokens=9, **GREEDY)
    settings = ContinuousBatchingConfig(**SMALL)
    for seed in range(4):
        prompts = [prompt for prompt, _ in requests(8, seed)]
        with without_collection():
            model.generate_batch(prompts, continuous_batching_config=settings, persistent_manager=True)
        gc.collect()
        sizes.append(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor))
        cache = model._cached_continuous_batching_manager.batch_processor.cache
        held = selections_on(cache)
        assert sorted(held.layers) == [1, 2]  # the first is skipped
        places.append([s.kept.data_ptr() for s in held.all()])
        places[-1] += [w["mlp"].data_ptr() for w in held.windows.values()]
        unpacked = [pair for s in held.all() for pair in (s.inputs[0][0], s.output) if not pair.packed]
        places[-1] += [linear.weight.data_ptr() for linear in unpacked]
        assert compact_bytes(cache) > 0
    model.destroy_cached_continuous_batching_manager()
    assert sizes[1] == sizes[2] == sizes[3]
    assert places[1] == places[2] == places[3]


def test_generate_knows_nothing_of_it():
    """There it is a selection of its own for every generation, made anew from what was decoded."""
    model, wanted = pp_fx.transform(tiny_llama(), ROLLING), requests(3, seed=43)
    before = one_by_one(model, wanted)
    serve(model, wanted)
    assert one_by_one(model, wanted) == before
    other = pp_fx.transform(tiny_llama(), dataclasses.replace(ROLLING, decode="probe"))
    assert one_by_one(other, wanted) == before


def test_recorded_steps_would_not_roll():
    model = pp_fx.transform(tiny_llama(), ROLLING)
    with pytest.raises(ConfigError, match=r"use_cuda_graph=\(False, True\).*set .*use_cuda_graph=False"):
        check_compilation(ContinuousBatchingConfig(use_cuda_graph=(False, True)), settings_of(model))
    ids, starts = torch.tensor([[1, 2]]), torch.tensor([0, 1, 2])
    with pytest.raises(StateError, match="this call has no `cache`"):
        model(ids, cu_seq_lens_q=starts, write_index=[], use_cache=False)
