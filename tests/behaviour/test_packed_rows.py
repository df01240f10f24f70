"""Several sequences in one row: what the probe of attention sees, and what is refused."""

import pytest
import torch

import pp_fx
from pp_fx.errors import StateError
from pp_fx.rewrite.layer import layers_of
from tests.helpers.models import tiny_llama

CONFIG = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=0.3, skip_layers=0, round_to=1)
ROWS = pp_fx.ProbeConfig(attention="rows")
POSITIONS = torch.cat([torch.arange(20), torch.arange(12), torch.arange(8)])[None]
IDS = torch.randint(2, 97, (1, 40), generator=torch.Generator().manual_seed(1))


def probe_states(model, ids, **kwargs):
    """What the probe makes of its rows in the first layer's attention: [T', C]."""
    found, state = [], layers_of(model)[0].states()["attention"]
    probe = state.probe
    state.probe = lambda *args: found.append(probe(*args)) or found[-1]
    with torch.no_grad(), pp_fx.history_frozen(model):
        model(ids, position_ids=POSITIONS, use_cache=False, **kwargs)
    state.probe = probe
    return found[0].flatten(0, -2) if found[0].ndim == 3 else found[0][0]


def test_the_probe_of_heads_stays_within_a_sequence():
    config = pp_fx.ProbePruningConfig(**{**CONFIG.to_dict(), "probe": pp_fx.ProbeConfig(token_fraction=1.0)})
    model = pp_fx.transform(tiny_llama(), config)
    other = IDS.clone()
    other[:, :20] = IDS[:, :20].flip(1)
    one, two = probe_states(model, IDS), probe_states(model, other)
    assert not torch.allclose(one[:20], two[:20])
    torch.testing.assert_close(one[20:], two[20:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"probe": ROWS}, "the probe of attention heads would look"), ({"history": "position"}, "history='position'")],
)
def test_what_would_cross_a_border_is_refused(changes, message):
    model = pp_fx.transform(tiny_llama(), pp_fx.ProbePruningConfig(**{**vars(CONFIG), **changes}))
    with pytest.raises(StateError, match=message):
        model(IDS, position_ids=POSITIONS, use_cache=False)
    with pytest.raises(StateError, match=message):
        model(IDS, cu_seq_lens_q=torch.tensor([0, 20, 40]), use_cache=False)
    model(IDS, position_ids=torch.arange(40)[None], use_cache=False)
    model(IDS, position_ids=POSITIONS, attention_mask=torch.ones_like(IDS), use_cache=False)  # padded, as generate's


def test_without_a_mask_heads_are_refused():
    """Flash attention, which reads borders from position_ids, is told by its name alone."""
    model = pp_fx.transform(tiny_llama(), CONFIG)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(StateError, match="without flash attention"):
        model(IDS, position_ids=POSITIONS, use_cache=False)


def test_channels_need_no_borders():
    """An MLP looks at single tokens: a packed row is its sequences one by one, by a selection of the history."""
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=1, probe=None, mlp_compensation="mean")
    model = pp_fx.transform(tiny_llama(), config)
    pp_fx.calibrate(model, IDS.view(2, 20), progress=False)
    with torch.no_grad():
        packed = model(IDS, position_ids=POSITIONS, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in IDS.split([20, 12, 8], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)
