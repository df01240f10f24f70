"""A differential campaign: families, settings, shapes and padding drawn together, against the zeroed original.

30 draws here; `make soak` draws 1000. A failing draw shrinks and is stored by hypothesis for the next run.
"""

import copy
import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.transform import layers_of

from .families import FAMILIES, VOCABULARY, build
from .zeroed import transformed, zero_channels

DRAWS = int(os.environ.get("PP_FX_DRAWS", "30"))
NAMES = sorted(name for name, family in FAMILIES.items() if family.mlp is True)
_built = {}


@st.composite
def draws(draw):
    history = draw(st.sampled_from(["channel", "channel", "position", None]))
    config = pp_fx.ProbePruningConfig(
        mlp_ratio=draw(st.sampled_from([0.0, 0.2, 0.4, 0.6])),
        attention_ratio=draw(st.sampled_from([0.0, 0.4])),
        skip_layers=draw(st.sampled_from([0, 1])),
        round_to=draw(st.sampled_from([1, 8, 16])),
        probe=pp_fx.ProbeConfig(
            token_fraction=draw(st.sampled_from([0.025, 0.3, 1.0])),
            sample_fraction=draw(st.sampled_from([0.5, 1.0])),
            attention=draw(st.sampled_from(["queries", "rows"])),
        ),
        history=history,
        score=draw(st.sampled_from(["ppsp", "wanda_sp"])) if history else "ppsp",
        mlp_compensation=draw(st.sampled_from(["least_squares", "mean", None])),
        attention_compensation=draw(st.sampled_from(["mean", None])),
        compensation_min_tokens=draw(st.sampled_from([1, 64])),
        compensation_rank=draw(st.sampled_from([4, 64])),
    )
    batch, length = draw(st.integers(1, 4)), draw(st.integers(2, 45))
    return {
        "name": draw(st.sampled_from(NAMES)),
        "config": config,
        "calibrated": history is not None and draw(st.booleans()),
        "batch": batch,
        "length": length,
        "padding": draw(st.integers(0, length - 1)) if batch > 1 else 0,
        "right": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def original(name):
    if name not in _built:
        _built[name] = build(name)
    return copy.deepcopy(_built[name])


@settings(max_examples=DRAWS, deadline=None, suppress_health_check=list(HealthCheck))
@given(draws())
def test_pruned_is_the_original_with_its_dropped_units_zeroed(case):
    generator = torch.Generator().manual_seed(case["seed"])
    model = transformed(original(case["name"]), case["config"])
    ids = torch.randint(2, VOCABULARY, (case["batch"], case["length"]), generator=generator)
    if case["calibrated"]:
        pp_fx.calibrate(model, torch.randint(2, VOCABULARY, (3, 20), generator=generator), progress=False)
    mask = torch.ones_like(ids)
    if case["padding"]:
        mask[0, -case["padding"] :] = 0
        mask = mask if case["right"] else mask.flip(1)
    real = mask.bool()
    given_mask = {"attention_mask": mask} if case["padding"] else {}
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), pp_fx.history_frozen(model):
        got = model(ids, past_key_values=cache, **given_mask).logits
        chosen = selections_on(cache)
        chosen = {} if chosen is None else copy.deepcopy(chosen.layers)
        assert torch.equal(model(ids, **given_mask).logits[real], got[real]), "the same call twice"
        other = torch.where(real, ids, 2 + (ids + 7) % (VOCABULARY - 2))
        found = model(other, **given_mask).logits[real]
        assert torch.allclose(found, got[real], atol=1e-4, rtol=1e-4), "what padding holds does not matter"
    states = {
        (i, kind): s for i, layer in enumerate(layers_of(model)) for kind, s in layer.states().items() if s.prunes
    }
    assert {(i, kind) for i, groups in chosen.items() for kind in groups} == set(states)
    for (index, kind), state in states.items():
        kept = chosen[index][kind].kept.tolist()
        assert kept == sorted(set(kept))
        assert len(kept) == state.kept_units
        assert 0 <= min(kept) <= max(kept) < state.units
    plain = original(case["name"])
    zero_channels(plain, layers_of(model), _full(chosen))
    with torch.no_grad():
        expected = plain(ids, **given_mask).logits
    scale = expected[real].abs().max().clamp(min=1)
    torch.testing.assert_close(got[real] / scale, expected[real] / scale, atol=1e-3, rtol=0)


def _full(chosen):
    """Selections whose compensation the oracle can add: none is a vector of zeros."""
    from pp_fx.compensation import Compensation

    for groups in chosen.values():
        for selection in groups.values():
            if selection.compensation is None:
                selection.compensation = Compensation(torch.zeros(()), None)
    return chosen
