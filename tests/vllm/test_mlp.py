"""One MLP beside plain torch: the channels that it dropped zeroed, what stands in for them added."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vllm", reason="needs vLLM; `make vllm` makes an environment with it")

from pp_fx.errors import UnsupportedModelError
from pp_fx.integrations.vllm.mlp import PrunedMlp
from pp_fx.integrations.vllm.operators import SAMPLE
from pp_fx.kernels.coded import decode, encode, rounded
from pp_fx.runtime.engine_step import plan_step
from pp_fx.runtime.select import history_scores
from pp_fx.runtime.selections import selections_on

from .conftest import SETTINGS

H, C = 32, 96


def act(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class Starts:
    """In place of vLLM's forward context."""

    def __init__(self, settings):
        self.settings, self.starts = settings, [0]

    def present(self, x):
        return plan_step(self.starts, x.shape[0], self.settings, self)


def make(settings=SETTINGS, bias=False, seed=0, stepped=0.0, weights=None):
    """A loaded MLP, its weights (drawn, or gate over up and output as given), and who says where requests start."""
    draw = torch.Generator().manual_seed(seed)
    inputs, output = torch.randn(2 * C, H, generator=draw), torch.randn(H, C, generator=draw)
    inputs, output = weights or (inputs, output)
    first = torch.randn(2 * C, generator=draw) if bias else None
    last = torch.randn(H, generator=draw) if bias else None
    steps = Starts(settings)
    mlp = PrunedMlp("m", 1, 0.4, stepped, settings, steps, act, False, lambda: None)
    mlp.take_inputs([C, C])
    mlp.take_output(C, [H])
    mlp.keep_inputs(inputs, first)
    mlp.keep_output(output)
    mlp.dense_inputs = lambda x, b: F.linear(x, inputs, b)
    mlp.dense_output = lambda z: F.linear(z, output)
    return mlp, steps, (inputs, first, output, last)


def call(mlp, x, first, last):
    """As a model calls it."""
    return mlp.result(act(mlp.run(x, first)), last)


def zeroed(x, weights, kept):
    """The MLP with the channels that are not kept zeroed."""
    inputs, first, output, last = weights
    z = act(F.linear(x, inputs, first))
    mask = torch.zeros(C).index_fill(0, kept, 1)
    return F.linear(z * mask, output, last)


def even_rows(x):
    count = SETTINGS.probe.positions(x.shape[0])
    return x[(2 * torch.arange(count) + 1) * x.shape[0] // (2 * count)]


@pytest.mark.parametrize("bias", [False, True])
def test_a_mixed_step(bias):
    """Prompts of 40 and 30 tokens between sequences that decode, and padding: the probe is spread over the prompts."""
    mlp, steps, weights = make(dataclasses.replace(SETTINGS, history=None, mlp_compensation=None), bias)
    steps.starts = [0, 1, 41, 42, 72, 73]
    x = torch.randn(80, H, generator=torch.Generator().manual_seed(1))
    prompts = torch.cat([torch.arange(1, 41), torch.arange(42, 72)])
    inputs, first, output, last = weights
    energy = act(F.linear(even_rows(x[prompts]), inputs, first)).pow(2).mean(0)
    scores = energy * output.pow(2).norm(dim=0)
    kept = scores.topk(mlp.state.kept_units).indices
    assert mlp.state.kept_units == 64  # 57.6 rounded up to a multiple of 16
    wanted = F.linear(act(F.linear(x, inputs, first)), output, last)
    wanted[prompts] = zeroed(x[prompts], weights, kept)
    torch.testing.assert_close(call(mlp, x, first, last), wanted, atol=1e-3, rtol=1e-4)


def test_the_history_alone():
    """Every prompt token, however few, runs the same channels; what is dropped is predicted by the history."""
    mlp, steps, weights = make(dataclasses.replace(SETTINGS, freeze_history=True, mlp_compensation="mean"))
    draw = torch.Generator().manual_seed(2)
    mlp.state.mean.copy_(torch.randn(C, generator=draw))
    mlp.state.energy.copy_(mlp.state.mean.square() + torch.rand(C, generator=draw))
    mlp.state.seen.fill_(1)
    mlp.state.calibrated = True
    mlp.select_by_history()
    kept = history_scores(mlp.state).topk(mlp.state.kept_units).indices
    _, _, output, _ = weights
    steps.starts = [0, 2, 3]
    x = torch.randn(3, H, generator=draw)
    wanted = F.linear(act(F.linear(x, weights[0])), output)
    wanted[:2] = zeroed(x[:2], weights, kept) + output @ mlp.state.mean.index_fill(0, kept, 0)
    torch.testing.assert_close(call(mlp, x, None, None), wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("probe", [None, "int8"])
@pytest.mark.parametrize("count", [3, 12])
def test_tokens_that_decode_choose_for_themselves(count, probe):
    """Few and many of them, between two prompts and alone."""
    settings = dataclasses.replace(SETTINGS, decode="step", step_probe=probe, min_select_tokens=1000)
    mlp, steps, weights = make(settings, True, stepped=0.5)
    inputs, first, output, last = weights
    steps.starts = [0, 4, *range(5, 5 + count), 12 + count]
    x = torch.randn(12 + count, H, generator=torch.Generator().manual_seed(4))
    alone = torch.arange(4, 4 + count)
    z = act(F.linear(x, inputs, first))
    gate = F.silu(F.linear(x, inputs[:C], first[:C])[alone])
    if probe:
        gate = F.silu(F.linear(rounded(x[alone]), decode(encode(inputs[:C], 8))[:, :H], first[:C]))
    kept = (gate.abs() * output.norm(dim=0)).topk(C // 2).indices
    z[alone] *= torch.zeros(count, C).scatter(1, kept, 1.0)
    wanted = F.linear(z, output, last)
    found = call(mlp, x, first, last)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    steps.starts = list(range(count + 1))
    torch.testing.assert_close(call(mlp, x[alone], first, last), found[alone], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.0])
def test_tokens_that_decode_share_a_selection(bias, threshold):
    """The first prompts' from their own step on, then that of the last tokens, in the memory of the one before."""
    settings = dataclasses.replace(
        SETTINGS, decode="rolling", history=None, mlp_compensation=None, reprobe_every=3, drift_threshold=threshold
    )
    mlp, steps, weights = make(settings, bias)
    inputs, first, output, last = weights
    draw = torch.Generator().manual_seed(6)

    def chosen(x):
        scores = act(F.linear(x, inputs, first)).pow(2).mean(0) * output.pow(2).norm(dim=0)
        return scores.topk(mlp.state.kept_units).indices

    def run(starts, count):
        steps.starts = starts
        x = torch.randn(count, H, generator=draw)
        return x, call(mlp, x, first, last)

    def close(found, wanted):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)

    x, found = run([0, 1, 2], 3)  # the last row is padding, here and below
    close(found, F.linear(act(F.linear(x, inputs, first)), output, last))
    window = x[:2]
    x, found = run([0, 1, 41, 42], 43)
    prompt = chosen(even_rows(x[1:41]))
    close(found, zeroed(x, weights, prompt))
    window = torch.cat([window, x[[0, 41]]])
    x, found = run([0, 1, 2], 3)
    window = torch.cat([window, x[:2]])[-3:]
    now = prompt if threshold == 0 else chosen(window)
    close(found[:2], zeroed(x[:2], weights, now))
    (selection,) = selections_on(steps).all()
    places = [t.data_ptr() for t in (selection.kept, *selections_on(steps).windows[1].values())]
    for length in (0, 40, 0):
        x, found = run([0, 1, *([1 + length] if length else []), 2 + length], 2 + length)
        window = torch.cat([window, x[[0, -1]]])[-3:]
    now = prompt if threshold == 0 else chosen(window)
    close(found, zeroed(x, weights, now))
    assert torch.equal(selection.kept, now.sort().values)
    assert [t.data_ptr() for t in (selection.kept, *selections_on(steps).windows[1].values())] == places
    assert torch.equal(now, prompt) == (threshold == 0)


def test_another_activation_is_refused():
    mlp, steps, (_, first, _, last) = make()
    steps.starts = [0, 40]
    sample = mlp.run(torch.randn(40, H), first)
    assert sample.shape == (40, 2 * SAMPLE)
    with pytest.raises(UnsupportedModelError, match="m does something else"):
        mlp.result(F.relu(sample[:, :SAMPLE]) * sample[:, SAMPLE:], last)


@pytest.mark.parametrize("sizes", [[C, C, C], [C, 2 * C]])
def test_sizes_that_are_no_gate_and_up(sizes):
    mlp = PrunedMlp("m", 1, 0.4, 0.0, SETTINGS, Starts(SETTINGS), act, False, lambda: None)
    with pytest.raises(UnsupportedModelError, match="are not the sizes"):
        mlp.take_inputs(sizes)
