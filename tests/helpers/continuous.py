"""Continuous batching, step for step the same at every run; and what it should compute, from a stock model."""

from __future__ import annotations

import functools
import itertools
import types
import unittest.mock

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api

from .reference_for import reference_for

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SMALL = {"num_blocks": 64, "page_size": 16, "max_batch_tokens": 128, "return_logprobs": True}


def requests(count, seed, longest=90, vocabulary=97):
    """Prompts of random lengths, and how many tokens each is to get."""
    draw = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    prompts = [torch.randint(2, vocabulary, (integer(1, longest),), generator=draw).tolist() for _ in range(count)]
    return [(prompt, integer(1, 9)) for prompt in prompts]


def one_by_one(model, wanted):
    """What `generate` makes of every request alone."""
    found = []
    for prompt, tokens in wanted:
        ids = torch.tensor([prompt])
        out = model.generate(ids, generation_config=GenerationConfig(max_new_tokens=tokens, **GREEDY))
        found.append(out[0, len(prompt) :].tolist())
    return found


def serve(model, wanted, padded=False, together=True, **changes):
    """Tokens and log probabilities of every request.

    All requests wait before the first step, so that the steps are the same at every run; or each waits for the end of
    the one before, and not `together`. `padded`: the flat row is padded to a multiple of 64, as transformers pads it
    for compiled steps.
    """
    with without_collection():
        return _serve(model, wanted, padded, together, changes)


def without_collection():
    """A manager that ends collects no garbage, which takes longer than all the steps of a tiny model."""
    return unittest.mock.patch.object(continuous_api, "gc", types.SimpleNamespace(collect=lambda: None))


def _serve(model, wanted, padded, together, changes):
    manager = model.init_continuous_batching(
        GenerationConfig(**GREEDY), ContinuousBatchingConfig(**{**SMALL, **changes})
    )
    if padded:
        manager.batch_processor = manager._create_batch_processor()
        manager.batch_processor.model_runner.pad_inputs = True
    groups = [wanted] if together else [[one] for one in wanted]
    found = {}
    try:
        for group in groups:
            names = [manager.add_request(prompt, max_new_tokens=tokens) for prompt, tokens in group]
            if not manager.is_running():
                manager.start()
            found |= _results(manager, names)
    finally:
        manager.stop(block=True)
        manager.destroy()
    return [(result.generated_tokens, result.logprobs) for result in found.values()]


def _results(manager, names):
    """Name -> result, in the order of the names."""
    found = {}
    while len(found) < len(names):
        result = manager.get_result(timeout=1)
        assert result is not None or manager.is_running()
        if result is not None:
            assert result.error is None, result.error
            found[result.request_id] = result
    return {name: found[name] for name in names}


def assert_same(got, expected, tolerance=1e-3):
    """Token for token, and the probabilities of them."""
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
    for (_, one), (_, other) in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=tolerance, rtol=0)


def prompt_tokens(starts):
    """Places in the flat row of the tokens of requests that run more than one."""
    return [t for a, b in itertools.pairwise(starts) if b - a > 1 for t in range(a, b)]


class StepOracle:
    """A stock Llama whose MLPs prune the prompt tokens of every step by the reference algorithm.

    Attributes:
        gap: the least relative distance between a unit that was kept and one that was not.
        steps: of every step how many prompt tokens and how many others it ran.
    """

    def __init__(self, model, config):
        self.reference, self.config = reference_for(model, config), config
        self.gap, self.steps = float("inf"), []
        model.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for i, layer in enumerate(model.model.layers):
            layer.post_attention_layernorm.register_forward_pre_hook(functools.partial(self._residual, i))
            layer.mlp.register_forward_hook(functools.partial(self._mlp, i))

    def _begin(self, module, args, kwargs):
        starts = kwargs["cu_seq_lens_q"].tolist()
        pruned = prompt_tokens(starts)
        self.pruned = pruned if len(pruned) >= self.config.min_select_tokens else []
        self.steps.append((len(self.pruned), starts[-1] - len(self.pruned)))
        self.residual = {}

    def _residual(self, i, module, args):
        self.residual[i] = args[0]

    def _mlp(self, i, module, args, out):
        r = self.reference
        if self.pruned and r.s.mlp_kept[i] < r.c.intermediate_size:
            out = out.clone()
            out[:, self.pruned] = self.prune(i, self.residual[i][:, self.pruned])
            self.gap = min(self.gap, r.gap)
        return out

    def prune(self, i, residual):
        """The MLP of layer i over prompt tokens [1, P, H]."""
        r = self.reference
        r.kept, r.bias, r.gap, r.prompt, r.begin = {}, {}, float("inf"), None, [0]
        layer, real = r.m.model.layers[i], torch.ones(residual.shape[:2], dtype=torch.bool)
        kept, channels = r.s.mlp_kept[i], r.c.intermediate_size
        return r.branch(
            i, "mlp", layer, residual, real, layer.mlp.down_proj, channels, kept, 1, r.s.compensation_mlp
        )  # fmt: skip


class FrozenOracle(StepOracle):
    """Likewise by a history alone, of any number of prompt tokens; the mean of what is dropped is added.

    `history`: layer -> mean of z^2 and of z, both [C].
    """

    def __init__(self, model, config, history):
        super().__init__(model, config)
        self.history = history

    def _begin(self, module, args, kwargs):
        super()._begin(module, args, kwargs)
        self.pruned = prompt_tokens(kwargs["cu_seq_lens_q"].tolist())

    def prune(self, i, residual):
        r, (energy, mean) = self.reference, self.history[i]
        r.gap = float("inf")
        layer = r.m.model.layers[i]
        weight = layer.mlp.down_proj.weight
        order = (weight.square() * energy).square().sum(0).argsort(descending=True)
        kept, dropped = order[: r.s.mlp_kept[i]], order[r.s.mlp_kept[i] :]
        z = r.mlp(layer, r.norm(residual, layer.post_attention_layernorm.weight))
        return z[..., kept] @ weight[:, kept].T + weight[:, dropped] @ mean[dropped]
