"""Compiled calls that overwrite their outputs, as CUDA graphs do: what a generation keeps on its KV cache survives."""

import copy
import inspect

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

import pp_fx
from pp_fx.cache import forget, reserve, selections_on
from pp_fx.errors import InputError, StateError
from pp_fx.kernels import packed_linear
from pp_fx.runtime import buffers
from pp_fx.runtime.cuda_graphs import compiles_cuda_graphs
from tests.helpers.models import tiny_llama
from tests.helpers.overwriting import begin, overwriting

SETTINGS = {
    "mlp_ratio": 0.4,
    "attention_ratio": 0.25,
    "skip_layers": 1,
    "round_to": 1,
    "freeze_history": True,
    "decode": "sticky",
}
CONFIGS = {
    "sticky": {},
    "least squares": {"compensation_min_tokens": 1},
    "mlp": {"attention_ratio": 0.0},
    "heads": {"mlp_ratio": 0.0, "attention_ratio": 0.4},
    "no compact weights": {"compact_megabytes": 0},
    "re-probe": {"decode": "probe", "reprobe_every": 3},
    "drift": {"drift_threshold": 0.9, "reprobe_every": 3},
    "dense decoding": {"decode": "dense"},
}


@pytest.fixture(params=[False, True], ids=["rows", "packed"])
def packed(request, monkeypatch):
    """With and without a CPU's opaque weights."""
    if not request.param:
        monkeypatch.setattr(packed_linear, "PACKED_DTYPES", frozenset())
    elif torch.float32 not in packed_linear.PACKED_DTYPES:
        pytest.skip("oneDNN packs nothing here")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    begin()
    torch._dynamo.reset()


def transformed(**changes):
    return pp_fx.transform(tiny_llama(layers=2), pp_fx.ProbePruningConfig(**{**SETTINGS, **changes}))


def compiled(model):
    return torch.compile(model, backend=overwriting, fullgraph=True, dynamic=False)


def static(model, size=80, batch=3):
    cache = StaticCache(config=model.config, max_cache_len=size)
    text = model.config
    cache.early_initialization(batch, text.num_key_value_heads, text.hidden_size // text.num_attention_heads,
                               model.dtype, model.device)  # fmt: skip
    return cache


def greedy(prompt, step, ids, cache, steps=8):
    """Tokens [B, 1 + steps]: the prompt through one model, every step through another, on the same cache."""
    with torch.no_grad():
        begin()
        token = prompt(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True).clone()
        tokens = [token]
        for _ in range(steps):
            begin()
            token = step(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True).clone()
            tokens.append(token)
    return torch.cat(tokens, 1)


SLOW = {("compiled", name) for name in ("re-probe", "no compact weights", "heads", "mlp")}
"""Those whose parts other cases have, too."""
ORDERS = [
    pytest.param(prompts, name, marks=[pytest.mark.slow] if (prompts, name) in SLOW else [])
    for prompts in ("eager", "compiled")
    for name in CONFIGS
]


@pytest.mark.parametrize("name", ["sticky", "least squares", pytest.param("drift", marks=pytest.mark.slow)])
@pytest.mark.parametrize("prompts", ["eager", "compiled"])
def test_packed_weights_serve_one_prompt_after_the_other(name, prompts, ids):
    if torch.float32 not in packed_linear.PACKED_DTYPES:
        pytest.skip("oneDNN packs nothing here")
    serve(CONFIGS[name], prompts, ids)


@pytest.mark.parametrize(("prompts", "name"), ORDERS)
def test_a_static_cache_serves_one_prompt_after_the_other(prompts, name, ids, monkeypatch):
    monkeypatch.setattr(packed_linear, "PACKED_DTYPES", frozenset())
    serve(CONFIGS[name], prompts, ids)


def serve(changes, prompts, ids):
    """Three prompts on one cache, and eight steps behind each."""
    model = transformed(**changes)
    step = compiled(model)
    prompt = model if prompts == "eager" else step
    cache = static(model)
    if prompts == "compiled":
        reserve(model, cache, 3)
    for seed in range(3):
        given = torch.randint(2, 97, ids.shape, generator=torch.Generator().manual_seed(seed))
        expected = greedy(model, model, given, static(model))
        cache.reset()
        assert torch.equal(greedy(prompt, step, given, cache), expected), seed
    assert not counters["graph_break"]


def test_the_backend_overwrites(ids):
    """The stock model passes; a step that reads what an earlier compiled call made does not."""
    model = tiny_llama(layers=2)
    assert torch.equal(greedy(model, compiled(model), ids, static(model)), greedy(model, model, ids, static(model)))
    held = []

    def step(x):
        if not held:
            held.append(x + 1)
        return x + held[0]

    run, x = torch.compile(step, backend=overwriting, fullgraph=True), torch.zeros(3)
    first = run(x).clone()
    begin()
    assert first.isfinite().all()
    assert run(x).isnan().all()


@pytest.mark.parametrize("prompts", ["eager", "compiled"])
def test_two_generations_take_turns(prompts, packed, ids):
    model = transformed()
    step = compiled(model)
    lines, caches = [ids, ids.flip(1)], [static(model), static(model)]
    expected = [greedy(model, model, line, static(model), 6) for line in lines]
    tokens = [[], []]
    with torch.no_grad():
        for turn in range(7):
            for line, cache, made in zip(lines, caches, tokens, strict=True):
                if turn == 0 and prompts == "compiled":
                    reserve(model, cache, 3)
                begin()
                run = model if turn == 0 and prompts == "eager" else step
                out = run(line if turn == 0 else made[-1], past_key_values=cache).logits
                made.append(out[:, -1].argmax(-1, keepdim=True).clone())
    assert [torch.equal(torch.cat(t, 1), e) for t, e in zip(tokens, expected, strict=True)] == [True, True]


def test_generates_own_compilation_counts_as_many_graphs_as_dense(packed):
    """generate() runs the prompt uncompiled and compiles decoding: one decode graph, for every prompt."""
    settings = CompileConfig(fullgraph=True, backend=overwriting, mode=None, dynamic=False)
    settings._compile_all_devices = True
    dense, pruned = tiny_llama(layers=2), transformed()
    graphs = []
    for model in (dense, pruned):
        torch._dynamo.reset()
        counters.clear()
        for seed in range(3):
            given = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(seed))
            options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
            expected = model.generate(given, disable_compile=True, **options)
            begin()
            assert torch.equal(model.generate(given, compile_config=settings, **options), expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[0] > 0


def test_beams_share_the_selection(packed, ids):
    """transformers compiles nothing of beam search by itself; here its steps are."""
    model = transformed()
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "cache_implementation": "static"}
    expected = model.generate(ids, **options)
    plain, step = model.forward, torch.compile(model.forward, backend=overwriting, fullgraph=True, dynamic=False)

    def forward(**kwargs):
        begin()
        return (step if kwargs["input_ids"].shape[1] == 1 else plain)(**kwargs)

    forward.__signature__ = inspect.signature(plain)
    model.forward = forward
    assert torch.equal(model.generate(ids, **options), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_second_prompt_compiles_nothing_and_moves_nothing(packed, ids):
    model = transformed()
    step = compiled(model)
    cache = reserve(model, static(model), 3)

    def addresses():
        pairs = [t for s in selections_on(cache).all() for t in (s.inputs[0][0], s.output)]
        found = [t.data_ptr() for pair in pairs for t in (pair.weight, pair.bias) if t is not None and not pair.packed]
        return [*found, *(t.data_ptr() for s in selections_on(cache).all() for t in (s.kept, s.columns))]

    found = []
    for turn in range(3):
        cache.reset()
        greedy(model if turn == 2 else step, step, ids.roll(turn, 1), cache)
        found.append((addresses(), counters["stats"]["unique_graphs"]))
    assert found[1] == found[0]
    assert found[2] == found[0]  # an eager prompt writes into the same memory


def test_reserve_changes_neither_the_history_nor_the_cache(ids):
    model = transformed(freeze_history=False)
    pp_fx.calibrate(model, ids, progress=False)
    before = [b.clone() for layer in model.model.layers for s in layer.states().values() for b in s.buffers()]
    cache = static(model)
    assert reserve(model, cache, 3) is cache
    after = [b for layer in model.model.layers for s in layer.states().values() for b in s.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert int(cache.get_seq_length()) == 0
    with pp_fx.history_frozen(model):
        assert torch.equal(greedy(model, model, ids, cache), greedy(model, model, ids, static(model)))


def test_what_reserve_cannot_serve_is_refused(ids):
    model, other = transformed(), transformed(mlp_ratio=0.3)
    with pytest.raises(StateError, match="not transformed"):
        reserve(tiny_llama(layers=2), static(model), 3)
    with pytest.raises(InputError, match="batch=0"):
        reserve(model, static(model), 0)
    with pytest.raises(InputError, match="cache=dict"):
        reserve(model, {}, 3)
    cache = reserve(model, static(model), 3)
    with pytest.raises(StateError, match="batch=3, the call has 2 sequences"), torch.no_grad():
        model(ids[:2], past_key_values=cache)
    with pytest.raises(StateError, match="another model"), torch.no_grad():
        other(ids, past_key_values=cache)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(StateError, match="holds tokens"):
        reserve(model, cache, 3)
    far = static(model)
    for layer in far.layers:
        layer.keys = layer.keys.to("meta")
    with pytest.raises(StateError, match="cache lies on meta, the model on cpu"):
        reserve(model, far, 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"backend": "aot_eager"}, False),
    ],
)
def test_the_compilers_mode_is_known(options, expected):
    def add(x):
        return x + (1 if compiles_cuda_graphs() else 0)

    assert bool(torch.compile(add, fullgraph=True, **options)(torch.zeros(1))) is expected


@torch.no_grad()
@pytest.mark.parametrize("reserved", [True, False])
def test_a_prompt_under_cuda_graphs_asks_for_its_memory(reserved, ids, monkeypatch):
    """On a CPU, as if it had CUDA graphs. Without fullgraph such a prompt makes its memory uncompiled."""
    monkeypatch.setattr(packed_linear, "PACKED_DTYPES", frozenset())
    monkeypatch.setattr(buffers, "RECORDED", ("cpu",))
    monkeypatch.setattr(buffers, "compiles_cuda_graphs", lambda: True)
    model = transformed()
    cache, expected = static(model), model(ids, past_key_values=static(model)).logits
    if reserved:
        reserve(model, cache, 3)
        torch.testing.assert_close(compiled(model)(ids, past_key_values=cache).logits, expected, atol=1e-4, rtol=1e-4)
        return
    with pytest.raises(Exception, match=r"pp_fx\.cache\.reserve"):
        compiled(model)(ids, past_key_values=cache)
    torch._dynamo.reset()
    cache = static(model)
    got = torch.compile(model, backend="eager")(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert selections_on(cache).layers[1]["mlp"].output is not None


def test_an_emptied_cache_follows_the_model_to_another_dtype(packed, ids):
    model = transformed()
    cache = DynamicCache()
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype)
        with torch.no_grad():
            expected = model(ids, past_key_values=DynamicCache()).logits
            assert torch.equal(model(ids, past_key_values=cache).logits, expected)
        assert selections_on(cache).layers[1]["mlp"].output.weight.dtype == dtype
        cache = copy.deepcopy(cache)  # its own memory, of this dtype
        cache.layers = DynamicCache().layers


def test_a_forgotten_cache_selects_anew_in_the_same_memory(packed, ids):
    model = transformed()
    cache = static(model)
    greedy(model, model, ids, cache)
    address = selections_on(cache).layers[1]["mlp"].kept.data_ptr()
    cache.reset()
    forget(cache)
    step = compiled(model)
    with torch.no_grad():
        begin()
        got = step(ids[:, :1], past_key_values=cache).logits.clone()
        assert torch.equal(got, model(ids[:, :1], past_key_values=static(model)).logits)
    assert selections_on(cache).layers[1]["mlp"].kept.data_ptr() == address
