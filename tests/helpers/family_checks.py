"""What every decoder family is checked for. The tests run these one by one; docs/families.py writes their table."""

import contextlib
import copy
import functools
import warnings

import torch
from transformers import StaticCache

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.rewrite.layer import layers_of

from .families import VOCABULARY, build
from .zeroed import PRUNED, assert_equals_zeroed, left_padded, output_projection, transformed, zero_channels


@functools.cache
def _pruned(name):
    """A family's model, transformed with PRUNED, and the warnings of it: capture takes longest, so once for all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = pp_fx.transform(build(name), PRUNED)
    return model, [str(w.message) for w in caught]


def pruned(name):
    """A copy of a family's model, transformed with PRUNED."""
    return copy.deepcopy(_pruned(name)[0])


def warned(name):
    """What `transform` has warned of."""
    return _pruned(name)[1]


def some_ids(length=40):
    return torch.randint(2, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(1))


def exact_at_zero(name, implementation=None):
    """Logits and generated tokens are those of the untransformed model, bit for bit, with and without padding."""
    model, ids = build(name, implementation), some_ids()
    mask = left_padded(ids)

    def generated(**kwargs):
        return model.generate(ids, max_new_tokens=6, do_sample=False, **kwargs)

    with torch.no_grad():
        dense = model(ids).logits, model(ids, attention_mask=mask).logits, generated(), generated(attention_mask=mask)
        transformed(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0, skip_layers=0))
        assert torch.equal(model(ids).logits, dense[0])
        assert torch.equal(model(ids, use_cache=False).logits, dense[0])
        assert torch.equal(model(ids, attention_mask=mask).logits, dense[1])
        assert torch.equal(generated(), dense[2])
        assert torch.equal(generated(attention_mask=mask), dense[3])


def equals_zeroed(name):
    """Prefill and decoding on a DynamicCache equal the original with zeroed channels, with and without padding."""
    for padded in (False, True):
        assert_equals_zeroed(build(name), some_ids(), padded, pruned(name))


def selects_like_the_paper(name):
    """Where every row is probed, layer 1 keeps the units of the largest || (E[z^2])_j * ||W[:, j]^2|| ||."""
    config = pp_fx.ProbePruningConfig(
        mlp_ratio=0.4,
        attention_ratio=0.4,
        skip_layers=1,
        round_to=1,
        history=None,
        attention_score=None,
        compensation_min_tokens=32,
        decode="sticky",
        probe=pp_fx.ProbeConfig(token_fraction=1.0),
    )
    original, ids = build(name), some_ids(20)  # shorter than any sliding window
    model = transformed(copy.deepcopy(original), config)
    with torch.no_grad():
        chosen = selections_on(model(ids, use_cache=True).past_key_values).layers[1]
        for kind in sorted(chosen):  # attention first: the MLP reads what it leaves
            states = []
            layer = layers_of(model)[1]
            projection = output_projection(original, layers_of(model), 1, kind)
            handle = projection.register_forward_pre_hook(lambda m, args, states=states: states.append(args[0]))
            original(ids)
            handle.remove()
            group, state = layer.groups[kind], layer.states()[kind]
            columns = states[0].reshape(3, 20, -1).square().mean(0).sum(0)
            norms = projection.weight if group.output.transposed else projection.weight.t()
            norms = norms.square().square().sum(1).sqrt()
            score = (columns * norms).view(group.units, -1).norm(dim=1)
            kept = chosen[kind].kept
            dropped = [unit for unit in range(group.units) if unit not in kept.tolist()]
            assert len(kept) == state.kept_units < group.units
            assert score[kept].min() >= score[dropped].max() * (1 - 1e-4)
            zero_channels(original, layers_of(model), {1: {kind: chosen[kind]}})


def static_and_compiled(name, prunes=True):
    """A StaticCache under torch.compile(fullgraph=True) gives what a DynamicCache gives in eager mode."""
    torch._dynamo.reset()
    ids, model = some_ids(), pruned(name) if prunes else build(name)
    pieces = [
        (part, torch.ones(3, n, dtype=torch.long)) for part, n in ((ids, 40), (ids[:, :1], 41), (ids[:, 1:2], 42))
    ]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if prunes:
            stack.enter_context(pp_fx.history_frozen(model))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        expected, cache = [], None
        for piece, mask in pieces:
            out = model(piece, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            expected.append(out.logits)
        cache = StaticCache(config=model.config, max_cache_len=64)
        for (piece, mask), logits in zip(pieces, expected, strict=True):
            got = compiled(piece, attention_mask=mask, past_key_values=cache).logits
            scale = logits.abs().max().clamp(min=1)
            torch.testing.assert_close(got / scale, logits / scale, atol=1e-4, rtol=0)


CHECKS = {
    "exact at 0": exact_at_zero,
    "reference": selects_like_the_paper,
    "DynamicCache": equals_zeroed,
    "StaticCache, compiled": static_and_compiled,
}
