"""transformers' continuous batching: what a step prunes, beside the reference algorithm and a stock model."""

import copy
import dataclasses
import gc

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import pp_fx
from pp_fx.capture.calls import record_calls
from pp_fx.errors import ConfigError, StateError
from pp_fx.rewrite.engine_calls import check_compilation, engine_step
from pp_fx.rewrite.layer import layers_of
from pp_fx.rewrite.verify import random_call
from pp_fx.runtime.engine_step import ALL_DENSE, EngineStep
from pp_fx.runtime.names import STEP
from pp_fx.runtime.plan import LayerInfo
from pp_fx.runtime.selections import selections_on
from pp_fx.runtime.state import states_of
from tests.helpers.continuous import (
    GREEDY,
    SMALL,
    FrozenOracle,
    StepOracle,
    assert_same,
    one_by_one,
    requests,
    serve,
    without_collection,
)
from tests.helpers.families import FAMILIES, build
from tests.helpers.models import tiny_llama
from tests.helpers.zeroed import transformed

CONFIG = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=1, compensation_min_tokens=100)
FROZEN = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, skip_layers=1, round_to=1, freeze_history=True, mlp_compensation="mean"
)


def calibrated(model, config):
    pp_fx.transform(model, config)
    ids = torch.randint(2, 97, (4, 40), generator=torch.Generator().manual_seed(5))
    pp_fx.calibrate(model, ids, progress=False)
    return model


def history(model):
    return [buffer.clone() for state in states_of(model) for buffer in state.history().values()]


LONG = pytest.mark.slow
NOTHING, NEVER = {"mlp_ratio": 0.0}, {"mlp_ratio": 0.4, "min_select_tokens": 10_000}


@pytest.mark.parametrize(
    ("count", "attention", "changes"),
    [
        (12, "sdpa", NEVER),
        (12, "eager", NOTHING),
        pytest.param(200, "sdpa", NEVER, marks=LONG),
        pytest.param(200, "sdpa", NOTHING, marks=LONG),
    ],
)
def test_without_pruning_it_is_generate(count, attention, changes):
    model = tiny_llama(attention=attention)
    wanted = requests(count, seed=count)
    expected = one_by_one(model, wanted)
    pp_fx.transform(model, pp_fx.ProbePruningConfig(skip_layers=1, **changes))
    assert [tokens for tokens, _ in serve(model, wanted)] == expected


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (12, {}),
        (12, {"max_batch_tokens": 37}),
        pytest.param(12, {"scheduler_type": "prefill_first"}, marks=LONG),
        pytest.param(200, {}, marks=LONG),
        pytest.param(200, {"max_batch_tokens": 37}, marks=LONG),
    ],
)
def test_a_step_prunes_its_prompt_tokens_alone(count, changes):
    """Chunks of prompts beside decoding tokens; both kinds of compensation; a history that learns."""
    original = build("Qwen2") if changes else tiny_llama()
    model, wanted = pp_fx.transform(copy.deepcopy(original), CONFIG), requests(count, seed=3 + count)
    oracle = StepOracle(original, CONFIG)
    expected = serve(original, wanted, **changes)
    assert oracle.gap > 1e-6
    assert any(pruned and dense for pruned, dense in oracle.steps)
    assert any(dense and not pruned for pruned, dense in oracle.steps)
    assert_same(serve(model, wanted, **changes), expected)
    learned = history(model)
    assert any(buffer.any() for buffer in learned)


def test_padding_is_nobody():
    model, wanted = tiny_llama(), requests(12, seed=7)
    other = copy.deepcopy(model)
    for one in (model, other):
        pp_fx.transform(one, CONFIG)
    assert_same(serve(model, wanted, padded=True), serve(other, wanted))
    torch.testing.assert_close(history(model), history(other))


@pytest.mark.parametrize("probe", [None, pp_fx.ProbeConfig()])
def test_a_frozen_history_selects_once(probe):
    original, wanted = tiny_llama(), requests(12, seed=11)
    config = dataclasses.replace(FROZEN, probe=probe)
    model = calibrated(copy.deepcopy(original), config)
    before = history(model)
    known = {i: (s.energy, s.mean) for i, s in enumerate(layer.states()["mlp"] for layer in layers_of(model))}
    oracle = FrozenOracle(original, FROZEN, known)
    assert_same(serve(model, wanted), serve(original, wanted))
    assert oracle.steps
    assert all(map(torch.equal, history(model), before))


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=LONG)])
def test_a_frozen_history_makes_requests_independent(count):
    """Alone, and in company; with least squares, which a step's own size must not switch."""
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=1, freeze_history=True)
    model, wanted = calibrated(tiny_llama(), config), requests(count, seed=13)
    alone = serve(model, wanted, together=False)
    company = serve(model, wanted, max_batch_tokens=256)
    assert_same(company, alone)
    learning = pp_fx.transform(tiny_llama(), CONFIG)
    assert serve(learning, wanted) != serve(learning, wanted, together=False)  # else this shows nothing


def test_another_calibration_selects_otherwise():
    model = calibrated(tiny_llama(), FROZEN)
    wanted = [([*range(2, 60)], 4)]
    serve(model, wanted)
    state = layers_of(model)[1].states()["mlp"]
    held = state.held
    serve(model, wanted)
    assert state.held is held
    pp_fx.calibrate(model, torch.arange(2, 82).view(2, 40), progress=False)
    assert state.held is None
    serve(model, wanted)
    assert state.held is not None
    model.double()
    assert serve(model, wanted)
    assert state.held.compensation.vector.dtype == torch.float64


FAST = ("Llama", "OPT", "Phi3", "GPT-2")  # a gate, none, both projections in one weight, transposed weights


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=LONG) for f in FAMILIES])
def test_a_layer_taken_apart(family):
    """A fixed selection prunes every token by itself: the pruned tokens as if all were, the others as if none were."""
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=0, round_to=1, probe=None)
    model = transformed(build(family), config)
    layers = layers_of(model)
    calls = record_calls(model, layers, 1, 9)
    draw = torch.Generator().manual_seed(0)
    pruned, dense = torch.tensor([1, 2, 3, 7]), torch.tensor([0, 4, 5, 6, 8])
    for layer, call in zip(layers, calls, strict=True):
        state = layer.states().get("mlp")
        if state is None:
            assert family in ("Mixtral", "Qwen3-MoE", "GPT-OSS")
            continue
        state.energy.copy_(torch.rand(state.energy.shape, generator=draw))
        state.mean.copy_(torch.randn(state.mean.shape, generator=draw))
        state.seen.fill_(1)
        state.calibrated = True

        def run(step, layer=layer, call=call):
            args, kwargs = random_call(layer, call, None)
            with torch.no_grad():
                out = layer.forward(*args, **kwargs, **{STEP: step})
            return (out if isinstance(out, torch.Tensor) else out[0])[0]

        apart, whole, none = run(EngineStep(pruned, dense, True)), run(EngineStep(prunes=True)), run(ALL_DENSE)
        assert not torch.allclose(whole, none)
        scale = none.abs().max()
        torch.testing.assert_close(apart[pruned] / scale, whole[pruned] / scale, atol=1e-5, rtol=0)
        torch.testing.assert_close(apart[dense] / scale, none[dense] / scale, atol=1e-5, rtol=0)


def test_nothing_stays_of_ended_requests():
    model, sizes = pp_fx.transform(tiny_llama(), CONFIG), []
    model.generation_config = GenerationConfig(max_new_tokens=3, **GREEDY)
    settings = ContinuousBatchingConfig(**SMALL)
    for seed in range(3):
        prompts = [prompt for prompt, _ in requests(8, seed)]
        with without_collection():
            model.generate_batch(prompts, continuous_batching_config=settings, persistent_manager=True)
        gc.collect()
        sizes.append(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor))
    manager = model._cached_continuous_batching_manager
    assert selections_on(manager.batch_processor.cache) is None
    assert sizes[1] == sizes[2]
    model.destroy_cached_continuous_batching_manager()


def test_several_answers_to_one_prompt():
    model = pp_fx.transform(tiny_llama(), CONFIG)
    settings = GenerationConfig(
        max_new_tokens=4, do_sample=True, eos_token_id=None, pad_token_id=0, num_return_sequences=3
    )
    with without_collection():
        found = model.generate_batch([[*range(2, 70)], [5, 6]], settings, ContinuousBatchingConfig(**SMALL))
    assert [len(result.generated_tokens) for result in found.values()] == [4] * 6


def test_settings_that_do_not_fit():
    """Which do not: tests/unit/runtime/test_engine_step.py."""
    model = pp_fx.transform(tiny_llama(), dataclasses.replace(CONFIG, attention_ratio=0.2))
    message = r"attention_ratio=0\.2: continuous batching prunes channels of MLPs alone; set it to 0"
    with pytest.raises(ConfigError, match=message):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(ConfigError, match=message):  # whoever calls the model himself
        model(torch.tensor([[1, 2]]), cu_seq_lens_q=torch.tensor([0, 2]), write_index=[], use_cache=False)


@pytest.mark.parametrize("changes", [{"freeze_history": True}, {"probe": None}])
def test_a_frozen_history_must_be_there(changes):
    model = pp_fx.transform(tiny_llama(), pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, **changes))
    with pytest.raises(StateError, match="selects by the history alone in continuous batching, and the model has none"):
        model.generate_batch([[1, 2, 3]])


def test_compiled_steps_are_refused():
    model = pp_fx.transform(tiny_llama(attention="eager"), CONFIG)
    with pytest.raises(ConfigError, match="default_compile_level=0"):
        model.generate_batch([[1, 2, 3]], continuous_batching_config=ContinuousBatchingConfig(default_compile_level=1))
    assert model.config._attn_implementation == "eager"
    ids, given = torch.tensor([[1, 2]]), {"cu_seq_lens_q": torch.tensor([0, 2]), "write_index": [], "use_cache": False}
    with pytest.raises(Exception, match="that is compiled would repeat"):  # whoever compiles the model himself
        torch.compile(model, backend="eager", fullgraph=True)(ids, **given)
    pp_fx.restore(model)
    assert "init_continuous_batching" not in vars(model)


def test_recorded_steps_are_refused():
    """What transformers has resolved, as on CUDA with flash attention; a graph of decode steps repeats nothing."""
    with pytest.raises(ConfigError, match=r"use_cuda_graph=\(True, True\).*use_cuda_graph=\(False, True\)"):
        check_compilation(ContinuousBatchingConfig(use_cuda_graph=True), CONFIG)
    check_compilation(ContinuousBatchingConfig(use_cuda_graph=(False, True)), CONFIG)


def test_a_block_table_is_of_decoding_alone():
    """transformers gives one where every request runs one token: nothing is read of the device."""
    given = {"cu_seq_lens_q": torch.empty(3, device="meta"), "block_table": torch.zeros(1, 2, 4)}
    assert engine_step(LayerInfo(0, 1, CONFIG, CONFIG, True), None, (1, 2), given) is ALL_DENSE


def test_pages_without_borders_are_refused():
    """As another version of transformers might call."""
    model = pp_fx.transform(tiny_llama(), CONFIG)
    for wrong in ({"write_index": []}, {"cache": type("PagedCache", (), {})()}, {"block_table": torch.zeros(1)}):
        with pytest.raises(StateError, match=r"not with cu_seq_lens_q.*pp_fx was tested with"):
            model(torch.tensor([[1, 2]]), use_cache=False, **wrong)
    starts = torch.tensor([0, 2])
    with pytest.raises(StateError, match="the batch is 2"):
        model(torch.tensor([[1, 2], [3, 4]]), use_cache=False, write_index=[], cu_seq_lens_q=starts)
