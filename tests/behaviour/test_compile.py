"""torch.compile: no graph breaks, no recompiles across batches of one shape, the history as in eager."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import pp_fx
from pp_fx.runtime.state import states_of

CONFIGS = {
    "default": pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1),
    "even": pp_fx.ProbePruningConfig(
        mlp_ratio=0.4, skip_layers=1, round_to=1, probe=pp_fx.ProbeConfig(token_fraction=0.1, ranking="even")
    ),
    "outlier": pp_fx.ProbePruningConfig(
        mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, probe=pp_fx.ProbeConfig(ranking="outlier")
    ),
    "paper": pp_fx.ProbePruningConfig.paper(0.4, skip_layers=1, round_to=1),
}


def batch(seed, size=3, length=40):
    return torch.randint(2, 97, (size, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_for_all_batches_of_a_shape(llama, name, padded):
    pp_fx.transform(llama, CONFIGS[name])
    compiled_model = copy.deepcopy(llama)
    compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager", dynamic=False)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[0, :5] = 0
    kwargs = {"attention_mask": mask} if padded else {}
    for seed in range(3):
        with torch.no_grad():
            expected = llama(batch(seed), use_cache=False, **kwargs).logits
            got = compiled(batch(seed), use_cache=False, **kwargs).logits
        real = mask.bool() if padded else torch.ones_like(mask).bool()
        torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for a, b in zip(states_of(llama), states_of(compiled_model), strict=True):
        for x, y in zip(a.buffers(), b.buffers(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert all(s.seen == 1 for s in states_of(compiled_model) if s.prunes)


SLOW = ("paper", "outlier")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CONFIGS])
def test_dynamic_shapes_recompile_at_most_twice(llama, name):
    """Once for dynamic shapes, and once where a batch is large enough for the least-squares compensation."""
    compiled = torch.compile(pp_fx.transform(llama, CONFIGS[name]), fullgraph=True, backend="eager", dynamic=True)
    for seed, (size, length) in enumerate([(3, 40), (4, 48), (2, 56), (5, 64), (2, 300)]):
        with torch.no_grad():
            compiled(batch(seed, size, length), use_cache=False)
    assert counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]


def test_calibrate_of_a_compiled_forward_gives_the_same_history(llama):
    other = pp_fx.transform(copy.deepcopy(llama), CONFIGS["default"])
    pp_fx.transform(llama, CONFIGS["default"])
    llama.forward = torch.compile(llama.forward, fullgraph=True, backend="eager")
    for model in (llama, other):
        pp_fx.calibrate(model, batch(0), progress=False)
    for a, b in zip(states_of(llama), states_of(other), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


@pytest.mark.slow
def test_inductor_agrees_with_eager(llama):
    pp_fx.transform(llama, CONFIGS["default"])
    compiled = torch.compile(copy.deepcopy(llama), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch(0)).logits, llama(batch(0)).logits, atol=1e-4, rtol=1e-4)
