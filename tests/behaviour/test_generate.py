"""generate(): every decoding mode equals the untransformed model at ratio 0, and the prompt decides at ratio > 0."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

import pp_fx
from tests.helpers.device import to_device
from tests.helpers.models import tiny_llama

DENSE = pp_fx.ProbePruningConfig(mlp_ratio=0.0)
PRUNED = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, decode="sticky")


class StopAfter(StoppingCriteria):
    """Stop every sample after so many tokens in all."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def tiny_mistral():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, sliding_window=24, max_position_embeddings=256, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.ndim > 1 else p
    return to_device(model)


MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sample": {"num_beams": 3, "do_sample": True},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam return sequences": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "chunked prefill": {"prefill_chunk_size": 16},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
    "stopping criteria": {"stopping_criteria": StoppingCriteriaList([StopAfter(46)])},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no cache": {"use_cache": False},
}
ONE_SAMPLE = {"prompt lookup"}


def run(model, ids, **kwargs):
    set_seed(7)
    kwargs = {"max_new_tokens": 12, "do_sample": False, **kwargs}
    return model.generate(ids, return_dict_in_generate=True, output_scores=True, **kwargs)


def assert_same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.scores) == len(expected.scores)
    assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
@pytest.mark.parametrize("mode", MODES)
def test_ratio_zero_generates_token_for_token_what_the_original_does(make, mode, ids):
    model = make()
    ids = ids[:1] if mode in ONE_SAMPLE else ids
    mask = torch.ones_like(ids)
    if len(ids) > 1:  # left padding
        mask[0, :9] = 0
        ids = torch.where(mask == 0, 0, ids)
    expected = run(model, ids, attention_mask=mask, **MODES[mode])
    pp_fx.transform(model, DENSE)
    assert_same(run(model, ids, attention_mask=mask, **MODES[mode]), expected)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_pruned_and_repeats_itself(mode, ids):
    model = pp_fx.transform(tiny_llama(), PRUNED)
    ids = ids[:1] if mode in ONE_SAMPLE else ids
    dense = run(tiny_llama(), ids, **MODES[mode]).sequences
    with pp_fx.history_frozen(model):
        first, second = (run(model, ids, **MODES[mode]).sequences for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape != dense.shape or not torch.equal(first, dense)


def test_assisted_decoding_at_ratio_zero_and_pruned(llama, ids):
    assistant = tiny_llama(layers=2, seed=3)
    expected = run(llama, ids[:1], assistant_model=assistant)
    pp_fx.transform(llama, DENSE)
    pp_fx.transform(assistant, pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=0))
    assert torch.equal(run(llama, ids[:1], assistant_model=assistant).sequences, expected.sequences)


def test_assisted_decoding_gives_what_the_pruned_model_gives_alone(llama, ids):
    """Rejected candidates are cropped from the cache; the selection stays that of the prompt."""
    pp_fx.transform(llama, PRUNED)
    with pp_fx.history_frozen(llama):
        alone = run(llama, ids[:1]).sequences
        assert torch.equal(run(llama, ids[:1], assistant_model=tiny_llama(layers=2, seed=3)).sequences, alone)
        assert torch.equal(run(llama, ids[:1], prompt_lookup_num_tokens=4).sequences, alone)


@pytest.mark.slow  # quanto compiles its kernels
@pytest.mark.parametrize("backend", ["quanto"])
def test_quantized_cache_at_ratio_zero(llama, ids, backend):
    pytest.importorskip("optimum.quanto", reason="the quantized cache needs optimum-quanto")
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": backend, "nbits": 4}}
    expected = run(llama, ids, **settings)
    pp_fx.transform(llama, DENSE)
    assert_same(run(llama, ids, **settings), expected)
    pp_fx.restore(llama)
    pp_fx.transform(llama, PRUNED)
    assert run(llama, ids, **settings).sequences.shape == expected.sequences.shape


@pytest.mark.parametrize("config", [DENSE, PRUNED])
def test_a_conversation_goes_on_with_the_returned_cache(llama, ids, config):
    """A second turn on the cache of the first gives what one call per token gives (and the original at ratio 0)."""
    original = copy.deepcopy(llama)
    pp_fx.transform(llama, config)
    results = []
    for model in (original, llama) if config is DENSE else (llama, copy.deepcopy(llama)):
        with pp_fx.history_frozen(model):
            first = run(model, ids)
            turn = torch.cat([first.sequences, ids[:, :5]], 1)
            results.append(run(model, turn, past_key_values=first.past_key_values))
    assert_same(results[1], results[0])


def make_cache(kind, model, size=64):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=size)


def step(model, tokens, cache):
    with torch.no_grad():
        return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)


def alone(model, ids, kind, steps=6):
    cache = make_cache(kind, model)
    tokens = [step(model, ids, cache)]
    for _ in range(steps):
        tokens.append(step(model, tokens[-1], cache))
    return torch.cat(tokens, 1)


def interleaved(model, prompts, kind, steps=6):
    caches = [make_cache(kind, model) for _ in prompts]
    tokens = [[step(model, ids, cache)] for ids, cache in zip(prompts, caches, strict=True)]
    for _ in range(steps):
        for line, cache in zip(tokens, caches, strict=True):
            line.append(step(model, line[-1], cache))
    return [torch.cat(line, 1) for line in tokens]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_interleaved_generations_equal_the_same_run_alone(llama, ids, kind, compiled):
    pp_fx.transform(llama, PRUNED)
    prompts = [ids, ids.flip(0).flip(1)]
    torch._dynamo.reset()
    model = torch.compile(llama, fullgraph=True, backend="aot_eager") if compiled else llama
    with pp_fx.history_frozen(llama):
        expected = [alone(llama, p, kind) for p in prompts]
        got = interleaved(model, prompts, kind)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        # batches of different size side by side
        assert torch.equal(interleaved(model, [ids, ids[:1]], kind)[1], alone(llama, ids[:1], kind))
    torch._dynamo.reset()


def graphs_of(model, ids, kind):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = make_cache(kind, model)
    token = step(compiled, ids, cache)
    for _ in range(8):
        token = step(compiled, token, cache)
    first = counters["stats"]["unique_graphs"]
    cache = make_cache(kind, model)
    token = step(compiled, ids.flip(1), cache)
    for _ in range(8):
        token = step(compiled, token, cache)
    torch._dynamo.reset()
    assert not counters["graph_break"]
    return first, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_compiled_decoding_needs_one_graph_more_than_the_original(llama, ids, kind):
    """The first decode step gathers the compact weights: one graph of its own. A second generation needs none."""
    stock, _ = graphs_of(copy.deepcopy(llama), ids, kind)
    pp_fx.transform(llama, PRUNED)
    first, second = graphs_of(llama, ids, kind)
    assert first <= stock + 1
    assert second == first


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_generate_with_a_compiled_forward(llama, ids, cache):
    """The usual way to compile generate(): `model.forward = torch.compile(model.forward)`."""
    from torch._dynamo.utils import counters

    pp_fx.transform(llama, PRUNED)
    torch._dynamo.reset()
    counters.clear()
    with pp_fx.history_frozen(llama):
        expected = [run(llama, prompt, **cache).sequences for prompt in (ids, ids.flip(1))]
        llama.forward = torch.compile(llama.forward, fullgraph=True, backend="eager")
        got = [run(llama, ids, **cache).sequences]
        graphs = counters["stats"]["unique_graphs"]
        got.append(run(llama, ids.flip(1), **cache).sequences)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert counters["stats"]["unique_graphs"] == graphs  # a second prompt compiles nothing
    torch._dynamo.reset()


@pytest.mark.slow
def test_generates_own_compilation_of_a_static_cache(llama, ids):
    from transformers import CompileConfig

    pp_fx.transform(llama, PRUNED)
    settings = CompileConfig(fullgraph=True, mode="default")
    settings._compile_all_devices = True
    with pp_fx.history_frozen(llama):
        expected = run(llama, ids, cache_implementation="static", disable_compile=True).sequences
        got = run(llama, ids, cache_implementation="static", compile_config=settings).sequences
    assert torch.equal(got, expected)
