"""The Triton kernels in Triton's interpreter, and the operators on this device, against plain products."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pp_fx
from pp_fx.kernels import drop_jointly, gather_linear, gather_output, kept_rows, top
from tests.helpers.models import tiny_llama

SHAPES = (st.integers(0, 70), st.integers(1, 140), st.integers(1, 150), st.data())


def tensors(rows, hidden, channels, data, dtype=torch.float32, device="cpu"):
    count = data.draw(st.integers(1, channels))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    kept = torch.randperm(channels, generator=generator)[:count].sort().values
    x, z = (torch.randn(rows, size, generator=generator) for size in (hidden, count))
    weight = torch.randn(channels, hidden, generator=generator)
    return (t.to(device=device, dtype=dtype if t.is_floating_point() else None) for t in (x, z, weight, kept))


def agrees(linear, output, rows, hidden, channels, data, device="cpu", half=torch.bfloat16):
    turned = data.draw(st.booleans())
    for dtype, tolerance in ((torch.float32, 1e-4), (half, 3e-2)):
        x, z, weight, kept = tensors(rows, hidden, channels, data, dtype, device)
        weight = weight.t().contiguous().t() if turned else weight
        wide = weight.double()[kept]
        for found, right in (
            (linear(x, weight, kept), x.double() @ wide.t()),
            (output(z, weight, kept), z.double() @ wide),
        ):
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), right, atol=tolerance * 12, rtol=tolerance)


@settings(max_examples=40, deadline=None)
@given(*SHAPES)
def test_the_operators_are_products_with_the_kept_rows(rows, hidden, channels, data):
    agrees(gather_linear, gather_output, rows, hidden, channels, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_kept_rows_lie_as_the_weight_does(dtype, by_columns, grad):
    kept, weight = torch.tensor([0, 3, 4, 9]), torch.randn(10, 8).to(dtype)
    weight = (weight.t().contiguous().t() if by_columns else weight).requires_grad_(grad)
    torch._dynamo.reset()
    for run in (kept_rows, torch.compile(kept_rows, backend="aot_eager", fullgraph=True)):
        found = run(weight, kept)
        assert torch.equal(found, weight[kept])
        assert found.requires_grad == grad
        assert (found.t() if by_columns else found).is_contiguous()


def test_the_operators_are_registered_as_compilers_need_them():
    x, weight, kept = torch.randn(3, 8), torch.randn(10, 8), torch.tensor([1, 4, 7])
    torch.library.opcheck(gather_linear, (x, weight, kept))
    for laid in (weight, weight.t().contiguous().t()):
        torch.library.opcheck(gather_output, (torch.randn(3, 3), laid, kept))


@pytest.mark.parametrize(
    "changes", [{"bias": True}, *(pytest.param(c, marks=pytest.mark.slow) for c in ({}, {"kv_heads": 4}))]
)
def test_a_model_gives_the_same_with_products_in_place(ids, changes):
    """Up to `kernel_rows` rows; larger calls copy the rows as before."""
    made = []
    torch._dynamo.reset()
    for rows in (0, 120):
        config = pp_fx.ProbePruningConfig(
            mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, kernel_rows=rows
        )
        model = pp_fx.transform(tiny_llama(**changes), config)
        with torch.no_grad(), pp_fx.history_frozen(model):
            forward = torch.compile(model, fullgraph=True, backend="aot_eager")
            made.append([model(ids).logits, forward(ids).logits, model(torch.cat([ids, ids])).logits])
        made[-1].append(model.generate(ids, max_new_tokens=4, do_sample=False).float())
    for found, right in zip(*made, strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@settings(max_examples=8, deadline=None)  # each size is compiled for itself
@given(*SHAPES)
def test_the_kernels_on_a_gpu(rows, hidden, channels, data):
    agrees(gather_linear, gather_output, rows, hidden, channels, data, "cuda")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernels_in_tritons_interpreter():
    """In a process of its own: Triton decides at import whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.behaviour.test_kernels"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workspace_serves_every_mode_and_thread():
    """Grown in inference mode it is used outside of it, and threads that multiply at once do not meet."""
    kept = torch.arange(0, 300, 2)
    cases = [(torch.randn(5, 64), torch.randn(300 + 10 * i, 64)) for i in range(4)]
    with torch.inference_mode():
        gather_linear(*cases[0], kept)
    for x, weight in cases:
        torch.testing.assert_close(gather_linear(x, weight, kept), x @ weight[kept].t())

    def many(case):
        x, weight = case
        return all(torch.allclose(gather_linear(x, weight, kept), x @ weight[kept].t(), atol=1e-4) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, cases))


@pytest.mark.parametrize("changes", [{}, {"bias": True}])
@pytest.mark.parametrize("min_tokens", [1, 10_000])
def test_large_weights_in_the_workspace_give_the_same(ids, changes, min_tokens, monkeypatch):
    """Least squares and mean; of copies that are made whole, 120 rows take the correction whole, 40 as two factors."""
    settings = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=1, compensation_min_tokens=min_tokens)
    model = pp_fx.transform(tiny_llama(**changes), settings)
    with torch.no_grad(), pp_fx.history_frozen(model):
        whole = [model(x).logits for x in (ids, ids[:1])]
        monkeypatch.setattr(sys.modules["pp_fx.kernels.gather_linear"], "_LARGE", 700)
        large = [model(x).logits for x in (ids, ids[:1])]
    for found, expected in zip(large, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def picks_the_largest(top, scores, count):
    """Ascending places, none twice, of the largest scores; of the first among equals where the kernel chooses."""
    places = top(scores, count)
    assert places.dtype == torch.int64
    assert torch.equal(places, places.unique())
    assert torch.equal(scores[places].sort().values, scores.sort().values[len(scores) - count :])


SCORES = st.tuples(st.integers(1, 700), st.integers(0, 99), st.sampled_from(["normal", "equal", "infinite"]), st.data())


def scores(size, seed, kind, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    if kind == "equal":
        return torch.randint(-2, 3, (size,), generator=generator).float().to(device)
    found = torch.randn(size, generator=generator)
    if kind == "infinite":
        found[0] = torch.inf
    return found.to(device)


@settings(max_examples=40, deadline=None)
@given(SCORES)
def test_top_gives_the_largest_in_order(case):
    size, seed, kind, data = case
    picks_the_largest(top, scores(size, seed, kind), data.draw(st.integers(1, size)))


@pytest.mark.gpu
@settings(max_examples=40, deadline=None)
@given(SCORES)
def test_top_on_a_gpu(case):
    size, seed, kind, data = case
    given_scores, count = scores(size, seed, kind, "cuda"), data.draw(st.integers(1, size))
    picks_the_largest(top, given_scores, count)


def some_gram(heads, seed, device="cpu"):
    outputs = torch.randn(heads, 5, generator=torch.Generator().manual_seed(seed))
    return (outputs @ outputs.t() + torch.eye(heads)).to(device)


HEADS = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.integers(0, 99)))


@settings(max_examples=30, deadline=None)
@given(HEADS)
def test_heads_are_dropped_greedily(case):
    heads, dropped, seed = case
    gram = some_gram(heads, seed)
    order = drop_jointly(gram, dropped)
    gone = []
    for step in range(dropped):
        left = [h for h in range(heads) if h not in gone]
        joint = [gram[[*gone, h]][:, [*gone, h]].sum().item() for h in left]
        chosen = int((order == step).nonzero())
        assert chosen in left
        assert gram[[*gone, chosen]][:, [*gone, chosen]].sum().item() <= min(joint) + 1e-3
        gone.append(chosen)
    assert order.isinf().sum() == heads - dropped


@pytest.mark.gpu
@settings(max_examples=15, deadline=None)
@given(HEADS)
def test_heads_are_dropped_on_a_gpu_as_on_the_cpu(case):
    heads, dropped, seed = case
    gram = some_gram(heads, seed)
    assert torch.equal(drop_jointly(gram.to("cuda"), dropped).cpu(), drop_jointly(gram, dropped))


if __name__ == "__main__":
    from pp_fx.kernels import triton_drop, triton_top
    from pp_fx.kernels.triton_gather import linear, output

    @settings(max_examples=6, deadline=None)
    @given(*SHAPES)
    def interpreted(rows, hidden, channels, data):
        # numpy, the interpreter's ground, multiplies no bf16
        agrees(linear, output, rows, hidden, channels, data, half=torch.float16)

    @settings(max_examples=30, deadline=None)
    @given(SCORES)
    def interpreted_top(case):
        size, seed, kind, data = case
        picks_the_largest(triton_top.top, scores(size, seed, kind), data.draw(st.integers(1, size)))

    @settings(max_examples=30, deadline=None)
    @given(HEADS)
    def interpreted_drop(case):
        heads, dropped, seed = case
        gram = some_gram(heads, seed)
        assert torch.equal(triton_drop.drop_jointly(gram, dropped), drop_jointly(gram, dropped))

    interpreted()
    interpreted_top()
    interpreted_drop()
