"""The Gram matrix of heads: from a batch, from calibration, and what dropping a set of heads costs by it."""

import itertools

import torch

import pp_fx
from pp_fx.calibration.gram_sums import gram_of_sums, gram_sums
from pp_fx.methods import SCORES, Statistics
from pp_fx.rewrite.layer import layers_of
from pp_fx.runtime.head_gram import output_gram


def made(rows=50, units=4, width=8, hidden=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, units * width, generator=generator) + 1
    residual = torch.randn(rows, hidden, generator=generator) * (1 + torch.arange(rows))[:, None]
    return z, residual, torch.randn(hidden, units * width, generator=generator)


def error_without(heads, z, residual, weight, width=8):
    """Mean over the rows of || what the heads' absence changes, means added back ||^2 / mean(residual^2)."""
    keep = torch.zeros(z.shape[1])
    for head in heads:
        keep[head * width : (head + 1) * width] = 1
    missing = ((z - z.mean(0)) * keep) @ weight.t()
    return (missing.square().sum(1) / residual.square().mean(1)).mean()


def test_the_sum_over_a_set_is_the_error_of_dropping_it():
    z, residual, weight = made()
    gram = output_gram(z, residual, None, weight, 4)
    for count in (1, 2, 3):
        for heads in itertools.combinations(range(4), count):
            part = list(heads)
            torch.testing.assert_close(gram[part][:, part].sum(), error_without(heads, z, residual, weight))


def test_rows_that_are_not_real_do_not_count():
    z, residual, weight = made()
    real = torch.arange(50) % 3 > 0
    expected = output_gram(z[real], residual[real], None, weight, 4)
    z[~real] = torch.nan
    torch.testing.assert_close(output_gram(z, residual, real, weight, 4), expected)


def test_sums_of_batches_are_those_of_their_sequences():
    z, residual, weight = made(rows=1200)
    z, residual = z.view(4, 300, -1), residual.view(4, 300, -1)
    real = torch.rand(4, 300, generator=torch.Generator().manual_seed(1)) > 0.3
    z = torch.where(real[:, :, None], z, torch.nan)
    total = {}
    for part in (slice(0, 1), slice(1, 4)):
        for key, value in gram_sums(z[part], residual[part], real[part], weight, 4).items():
            total[key] = value.double() + total.get(key, 0)
    found = [output_gram(*rows, weight, 4) * rows[2].sum() for rows in zip(z, residual, real, strict=True)]
    expected = (sum(found) / real.sum()).double()
    torch.testing.assert_close(gram_of_sums(total), expected, atol=1e-4, rtol=1e-4)


def test_a_sequence_without_a_real_row_adds_nothing():
    z, residual, weight = made()
    z, residual = torch.stack([z, z * torch.nan]), torch.stack([residual, residual])
    real = torch.tensor([[True], [False]]).expand(2, 50)
    found = gram_of_sums(gram_sums(z, residual, real, weight, 4))
    torch.testing.assert_close(found, output_gram(z[0], residual[0], None, weight, 4), atol=1e-4, rtol=1e-4)


def test_the_greedy_order_starts_with_the_cheapest_head():
    z, residual, weight = made(seed=3)
    gram = output_gram(z, residual, None, weight, 4)
    score = SCORES["joint"].units(Statistics(None, None, None, 2, gram))
    assert score.isinf().sum() == 2
    first, second = (score == 0).nonzero().item(), (score == 1).nonzero().item()
    assert first == gram.diagonal().argmin()
    costs = {h: gram[[first, h]][:, [first, h]].sum().item() for h in range(4) if h != first}
    assert second == min(costs, key=costs.get)


def test_calibration_takes_the_gram_matrix_of_all_sequences(llama, ids):
    layer = llama.model.layers[1]
    seen = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update(z=a[0])),
        layer.register_forward_pre_hook(lambda m, a: seen.update(residual=a[0])),
    ]
    weight = layer.self_attn.o_proj.weight.detach().clone()
    with torch.no_grad():
        llama(ids)
    for hook in hooks:
        hook.remove()
    pp_fx.transform(llama, pp_fx.ProbePruningConfig(attention_ratio=0.5, skip_layers=1))
    pp_fx.calibrate(llama, ids, progress=False, batch_size=2)
    made = [output_gram(z, residual, None, weight, 4) for z, residual in zip(seen["z"], seen["residual"], strict=True)]
    expected = torch.stack(made).mean(0)
    torch.testing.assert_close(layers_of(llama)[1].pp_attention.gram, expected, atol=1e-4, rtol=1e-4)
