"""The graphs against the independent reference: same kept units, same logits."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pp_fx
from pp_fx.cache import selections_on
from tests.helpers.models import tiny_llama
from tests.helpers.reference_for import reference_for


@st.composite
def cases(draw):
    heads, kv = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (2, 2)]))
    batch, length = draw(st.integers(1, 4)), draw(st.integers(2, 48))
    config = pp_fx.ProbePruningConfig(
        mlp_ratio=draw(st.sampled_from([0.0, 0.2, 0.5])),
        attention_ratio=draw(st.sampled_from([0.0, 0.3, 0.5])),
        skip_layers=draw(st.sampled_from([0, 1])),
        round_to=draw(st.sampled_from([1, 16])),
        probe=pp_fx.ProbeConfig(
            token_fraction=draw(st.sampled_from([0.025, 0.25, 0.5, 1.0])),
            sample_fraction=draw(st.sampled_from([0.05, 0.5, 1.0])),
            min_positions=draw(st.sampled_from([1, 4])),
            ranking=draw(st.sampled_from(["residual", "outlier", "even"])),
            first_position=draw(st.sampled_from(["always", "few", "never"])),
            attention=draw(st.sampled_from(["queries", "rows"])),
        ),
        history=draw(st.sampled_from(["channel", None])),
        history_rows=draw(st.sampled_from([16, 256])),
        attention_score=draw(st.sampled_from(["joint", None])),
        fusion_epsilon=draw(st.sampled_from([0.0, 1e-6])),
        mlp_compensation=draw(st.sampled_from(["mean", "least_squares", None])),
        attention_compensation=draw(st.sampled_from(["mean", "least_squares", None])),
        compensation_rows=draw(st.sampled_from([7, 256])),
        compensation_min_tokens=draw(st.sampled_from([1, 80])),
        decode="sticky",
    )
    mask = torch.ones(batch, length, dtype=torch.long)
    side = draw(st.sampled_from(["none", "left", "right"]))
    for row in range(batch if side != "none" else 0):
        padded = draw(st.integers(0, length - 1))
        if padded:
            mask[row, :padded] = 0
            mask[row] = mask[row] if side == "left" else mask[row].flip(0)
    return heads, kv, config, batch, length, mask, draw(st.integers(0, 10_000)), draw(st.booleans())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cases())
def test_graphs_match_the_reference(case):
    heads, kv, config, batch, length, mask, seed, bias = case
    model = tiny_llama(heads, kv, bias=bias, seed=seed)
    reference = reference_for(model, config)
    pp_fx.transform(model, config)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):  # the second and third batch meet a history
        ids = torch.randint(2, 97, (batch, length), generator=generator)
        expected = reference.forward(ids, mask)
        assume(expected.gap > 1e-4)
        with torch.no_grad():
            got = model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(length)[None], use_cache=True)
        for (layer, kind), kept in expected.kept.items():
            assert torch.equal(selections_on(got.past_key_values).layers[layer][kind].kept, kept), (layer, kind)
        real = mask.bool()
        scale = expected.logits[real].abs().max().clamp(min=1)
        torch.testing.assert_close(got.logits[real] / scale, expected.logits[real] / scale, atol=1e-4, rtol=0)


def test_reference_is_the_dense_model_when_nothing_is_dropped(llama, ids):
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.0, skip_layers=0)
    expected = reference_for(llama, config).forward(ids)
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, expected.logits, atol=1e-4, rtol=1e-4)
