"""What only a CUDA device shows: CUDA graphs, host synchronisation, half precision, and agreement with the CPU."""

import copy
import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

import pp_fx
from pp_fx.cache import reserve, selections_on
from pp_fx.runtime.state import states_of
from tests.helpers.models import tiny_llama

pytestmark = pytest.mark.gpu
SETTINGS = {
    "mlp_ratio": 0.4,
    "attention_ratio": 0.25,
    "skip_layers": 1,
    "round_to": 8,
    "freeze_history": True,
    "decode": "sticky",
}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.15}
"""Of the largest logit, the mean difference: in half precision two units that lie close change places."""
MODES = ["default", "reduce-overhead", "max-autotune"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch._dynamo.reset()


def model_on(device="cuda", dtype=torch.float32, **changes):
    settings = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "layers": 3, "intermediate": 320}
    model = tiny_llama(**settings).to(device, dtype)
    return pp_fx.transform(model, pp_fx.ProbePruningConfig(**{**SETTINGS, **changes}))


def prompt(seed=0, batch=3, length=48, device="cuda"):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def static(model, size=96):
    return StaticCache(config=model.config, max_cache_len=size)


def early(model, batch=3, size=96):
    cache, config = static(model, size), model.config
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    return cache


def logits(run, ids, cache=None, step=None, steps=6, **inputs):
    """Of the prompt's last position and of `steps` tokens fed one by one, the same ones whatever comes out."""
    step = run if step is None else step
    with torch.no_grad():
        found = [run(ids, past_key_values=cache, **inputs).logits[:, -1].clone()]
        for i in range(steps if cache is not None else 0):
            found.append(step(ids[:, i : i + 1].contiguous(), past_key_values=cache).logits[:, -1].clone())
    return torch.stack(found, 1)


def close(got, expected, dtype=torch.float32):
    scale = expected.float().abs().max().clamp(min=1)
    difference = (got.float() - expected.float()).abs() / scale
    assert (difference.max() if dtype == torch.float32 else difference.mean()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_ratio_zero_gives_what_the_original_gives(dtype, kind):
    dense = tiny_llama().to("cuda", dtype)
    model = pp_fx.transform(copy.deepcopy(dense), pp_fx.ProbePruningConfig(mlp_ratio=0.0))
    ids = prompt()
    caches = [DynamicCache() if kind is DynamicCache else static(m) for m in (dense, model)]
    assert torch.equal(logits(model, ids, caches[1]), logits(dense, ids, caches[0]))
    assert torch.equal(model.generate(ids, max_new_tokens=8), dense.generate(ids, max_new_tokens=8))


@pytest.mark.parametrize(
    "changes", [{}, {"compensation_min_tokens": 1}, {"probe": pp_fx.ProbeConfig(attention="rows")}]
)
def test_kept_units_and_logits_are_those_of_the_cpu(changes):
    """fp32, without TF32; eager on both, with one history: the signs of principal directions differ by library."""
    model, found = model_on("cpu", **changes), []
    pp_fx.calibrate(model, prompt(9, 4, 64, "cpu"), progress=False)
    for device in ("cpu", "cuda"):
        cache, model = DynamicCache(), model.to(device)
        out = logits(model, prompt(device=device), cache).cpu()
        groups = selections_on(cache).layers.items()
        found.append((out, {(i, n): s.kept.cpu() for i, group in groups for n, s in group.items()}))
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[0][1][k], found[1][1][k]) for k in found[0][1])
    close(found[1][0], found[0][0])


def test_calibration_gives_the_history_of_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        model = pp_fx.calibrate(model_on(device), prompt(9, 4, 64, device), progress=False)
        found.append([t.cpu() for s in states_of(model) for t in (s.energy, s.mean, s.gram) if t is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("mode", "dtype", "tokens"),
    [("default", torch.float32, None), ("default", torch.float16, 1), ("default", torch.bfloat16, 1),
     ("reduce-overhead", torch.float32, 1), ("max-autotune", torch.bfloat16, None)],
)  # fmt: skip
def test_compiled_prefill_gives_what_eager_gives(mode, dtype, tokens):
    """Without a KV cache, padded and not, with least squares (from 1 token on) and the mean."""
    model = model_on(dtype=dtype, compensation_min_tokens=tokens)
    run = torch.compile(model, fullgraph=True, mode=mode, dynamic=False)
    mask = torch.ones(3, 48, dtype=torch.long, device="cuda")
    mask[0, :9] = 0
    with torch.no_grad():
        for seed in range(3):
            for given in ({}, {"attention_mask": mask}) if mode == "default" else ({},):
                expected = model(prompt(seed), use_cache=False, **given).logits[:, -1]
                close(run(prompt(seed), use_cache=False, **given).logits[:, -1].clone(), expected, dtype)


@pytest.mark.parametrize(
    "changes", [{}, {"compact_megabytes": 0}, {"decode": "probe", "reprobe_every": 3}, {"decode": "step"}]
)
@pytest.mark.parametrize("mode", MODES[:2])
def test_compiled_decoding_gives_what_eager_gives(mode, changes):
    """The prompt uncompiled, steps compiled; one cache for three prompts: no graph of a later one is new."""
    model = model_on(**changes)
    step = torch.compile(model, fullgraph=True, mode=mode, dynamic=False)
    cache, graphs = static(model), []
    for seed in range(3):
        ids = prompt(seed)
        expected = logits(model, ids, static(model))
        cache.reset()
        close(logits(model, ids, cache, step), expected)
        graphs.append((counters["stats"]["unique_graphs"], _recorded()))
    if "reprobe_every" not in changes:
        assert graphs[2] == graphs[1], graphs


@pytest.mark.parametrize("mode", MODES[:2])
def test_compiled_prompts_on_a_reserved_cache(mode):
    model = model_on()
    run = torch.compile(model, fullgraph=True, mode=mode, dynamic=False)
    cache, graphs = reserve(model, early(model), 3), []
    for seed in range(3):
        ids = prompt(seed)
        expected = logits(model, ids, static(model))
        cache.reset()
        close(logits(run, ids, cache), expected)
        graphs.append((counters["stats"]["unique_graphs"], _recorded()))
    assert graphs[2] == graphs[1], graphs


def _recorded():
    """CUDA graphs recorded so far."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    waiting = [] if manager is None else [node for roots in manager.roots.values() for node in roots]
    count = 0
    while waiting:
        count += 1
        waiting.extend(child for children in waiting.pop().children.values() for child in children)
    return count


def test_a_prompt_under_cuda_graphs_asks_for_its_memory():
    model = model_on()
    run = torch.compile(model, fullgraph=True, mode="reduce-overhead", dynamic=False)
    with pytest.raises(Exception, match=r"pp_fx\.cache\.reserve"), torch.no_grad():
        run(prompt(), past_key_values=early(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generates_own_compilation(dtype):
    """generate(cache_implementation="static") compiles its steps with CUDA graphs."""
    model = model_on(dtype=dtype)
    for seed in range(2):
        ids = prompt(seed)
        options = {"max_new_tokens": 12, "do_sample": False}
        expected = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
        got = model.generate(ids, cache_implementation="static", **options)
        if dtype == torch.float32:
            assert torch.equal(got, expected)
            assert torch.equal(model.generate(ids, **options), expected)
        assert got.shape == expected.shape


def test_as_many_graphs_as_dense():
    found = []
    for model in (tiny_llama().to("cuda"), model_on()):
        torch._dynamo.reset()
        counters.clear()
        for seed in range(3):
            model.generate(prompt(seed), max_new_tokens=8, do_sample=False, cache_implementation="static")
        found.append(counters["stats"]["unique_graphs"])
    assert found[1] == found[0] > 0


def waits(call):
    """How often a call waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found, torch.no_grad():
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in found if "synchroniz" in str(w.message)]


@pytest.mark.parametrize("changes", [{}, {"compensation_min_tokens": 1}, {"kernel_rows": 4096}, {"decode": "step"}])
def test_nothing_waits_for_the_device(changes):
    """Compiled prompts and steps never; uncompiled ones no more often than the original's."""
    model, dense = model_on(**changes), tiny_llama().to("cuda")
    run = torch.compile(model, fullgraph=True, mode="default", dynamic=False)
    step = torch.compile(model, fullgraph=True, mode="reduce-overhead", dynamic=False)
    ids, cache, other = prompt(), static(model), static(dense)
    token = ids[:, :1].contiguous()
    for _ in range(3):
        cache.reset()
        other.reset()
        found = [waits(lambda: run(ids, use_cache=False)), waits(lambda: model(ids, past_key_values=cache))]
        found.append(waits(lambda: step(token, past_key_values=cache)))
        stock = waits(lambda: dense(ids, past_key_values=other))
    assert found[0] == found[2] == []
    assert len(found[1]) <= len(stock), found[1]
    caches = DynamicCache(), DynamicCache()
    pairs = [
        [waits(lambda c=c, m=m, t=t: m(t, past_key_values=c)) for t in (ids, token)]
        for c, m in zip(caches, (model, dense), strict=True)
    ]
    assert [len(w) for w in pairs[0]] <= [len(w) for w in pairs[1]], pairs[0]


def test_odd_counts_are_warned_of():
    with pytest.warns(UserWarning, match="round_to=1 keeps counts"):
        model_on(round_to=1)
    with warnings.catch_warnings(record=True) as found:
        model_on()
        model_on(round_to=None)
    assert not [w for w in found if "round_to" in str(w.message)]
