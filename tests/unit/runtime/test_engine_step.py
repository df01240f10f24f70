"""Which tokens of an engine's step are pruned."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import pp_fx
from pp_fx.runtime.engine_step import by_history, plan_step

SETTINGS = pp_fx.ProbePruningConfig(min_select_tokens=8)
FROZEN = pp_fx.ProbePruningConfig(min_select_tokens=8, freeze_history=True)


@pytest.mark.parametrize("settings", [SETTINGS, FROZEN])
def test_decoding_alone_is_dense(settings):
    assert not plan_step(range(20), 19, settings).prunes


def test_prompts_alone_need_no_index():
    assert plan_step([0, 5, 9], 9, SETTINGS) == (None, None)


def test_few_prompt_tokens_are_dense_unless_the_history_alone_selects():
    assert not plan_step([0, 1, 8], 8, SETTINGS).prunes
    assert plan_step([0, 1, 9], 9, SETTINGS).prunes
    assert plan_step([0, 1, 3], 3, FROZEN).pruned.tolist() == [1, 2]


def test_what_selects_by_the_history_alone():
    assert by_history(FROZEN)
    assert by_history(pp_fx.ProbePruningConfig(probe=None))
    assert not by_history(SETTINGS)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(0, 5))
def test_every_token_has_its_place(lengths, padding):
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    tokens = starts[-1] + padding
    step = plan_step(starts, tokens, SETTINGS)
    prompts = {t for a, n in zip(starts, lengths, strict=False) if n > 1 for t in range(a, a + n)}
    if len(prompts) < 8:
        assert not step.prunes
    elif len(prompts) == tokens:
        assert step == (None, None)
    else:
        assert set(step.pruned.tolist()) == prompts
        assert set(step.dense.tolist()) == set(range(tokens)) - prompts
