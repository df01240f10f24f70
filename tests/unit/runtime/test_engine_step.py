"""How the tokens of an engine's step run."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import pp_fx
from pp_fx.errors import ConfigError
from pp_fx.runtime.engine_step import ALL_DENSE, EngineStep, by_history, check_settings, plan_step

SETTINGS = pp_fx.ProbePruningConfig(min_select_tokens=8)
FROZEN = pp_fx.ProbePruningConfig(min_select_tokens=8, freeze_history=True)
STEP = pp_fx.ProbePruningConfig(min_select_tokens=8, decode="step")


@pytest.mark.parametrize("settings", [SETTINGS, FROZEN])
def test_decoding_alone_is_dense(settings):
    assert plan_step(range(20), 19, settings) == ALL_DENSE


@pytest.mark.parametrize("tokens", [19, 24])
def test_decoding_alone_chooses_by_step(tokens):
    """However many: what the kernels do not run is masked."""
    assert plan_step(range(20), tokens, STEP) == EngineStep(decode="step")


@pytest.mark.parametrize("settings", [SETTINGS, STEP])
def test_prompts_alone_need_no_index(settings):
    assert plan_step([0, 5, 9], 9, settings) == EngineStep(prunes=True)
    assert plan_step([0, 5], 5, settings) == plan_step([0, 5], 7, settings) == ALL_DENSE


def test_few_prompt_tokens_are_dense_unless_the_history_alone_selects():
    assert not plan_step([0, 1, 8], 8, SETTINGS).prunes
    assert plan_step([0, 1, 9], 9, SETTINGS).prunes
    assert plan_step([0, 1, 3], 3, FROZEN).prompts.tolist() == [1, 2]


def test_few_prompt_tokens_run_beside_tokens_that_choose():
    step = plan_step([0, 1, 4, 5], 6, STEP)
    assert (step.prompts.tolist(), step.others.tolist()) == ([1, 2, 3], [0, 4, 5])
    assert (step.prunes, step.decode) == (False, "step")


def test_padding_alone_beside_prompts_chooses_nothing():
    assert plan_step([0, 9], 10, STEP).decode == "dense"


def test_what_selects_by_the_history_alone():
    assert by_history(FROZEN)
    assert by_history(pp_fx.ProbePruningConfig(probe=None))
    assert not by_history(SETTINGS)


class Engine:
    """What lives as long as one."""


def test_steps_that_decode_are_counted():
    """Of a step's others those that decode come before padding."""
    settings = pp_fx.ProbePruningConfig(min_select_tokens=8, decode="rolling", reprobe_every=3)
    engine = Engine()
    steps = [plan_step([0, 1, 2], 2, settings, engine), plan_step([0, 9], 9, settings, engine)]
    steps += [plan_step([0, 1, 10, 11], 13, settings, engine) for _ in range(3)]
    assert [step.decode for step in steps] == ["rolling", "dense", "rolling", "rolling", "rolling"]
    assert [step.reprobes for step in steps] == [False, False, False, True, False]
    assert [step.decoding for step in steps] == [2, 0, 2, 2, 2]
    assert all(step.cache is engine for step in steps)
    assert steps[-1].others.tolist() == [0, 10, 11, 12]
    assert plan_step([0, 1], 1, settings, Engine()).reprobes is False  # another one counts for itself


@pytest.mark.parametrize("changes", [{"freeze_history": True}, {"probe": None}])
def test_what_the_history_alone_has_selected_is_not_probed(changes):
    settings = pp_fx.ProbePruningConfig(decode="rolling", reprobe_every=1, **changes)
    assert not plan_step([0, 1], 1, settings, Engine()).reprobes


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(0, 5), st.sampled_from([SETTINGS, STEP]))
def test_every_token_has_its_place(lengths, padding, settings):
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    tokens = starts[-1] + padding
    step = plan_step(starts, tokens, settings)
    prompts = {t for a, n in zip(starts, lengths, strict=False) if n > 1 for t in range(a, a + n)}
    assert step.prunes == (len(prompts) >= 8)
    assert step.decode == ("step" if settings is STEP and 1 in lengths else "dense")
    if step.prompts is None:
        assert step.others is None
        ways = {(step.prunes, "prompt")} if prompts else set()
        ways |= {(step.decode, "decode")} if len(prompts) < tokens else set()
        assert len(ways) < 2 or step == ALL_DENSE
    else:
        assert set(step.prompts.tolist()) == prompts
        assert set(step.others.tolist()) == set(range(tokens)) - prompts


REFUSED = {
    "heads": ({"attention_ratio": 0.2}, r"attention_ratio=0\.2: an engine prunes channels of MLPs alone"),
    "sticky": ({"decode": "sticky"}, r"decode='sticky'.*set one of 'auto', 'dense', 'step'"),
    "probe": ({"decode": "probe"}, r"decode='probe'"),
    "decode_ratio": (
        {"decode_ratio": 0.3},
        r"decode_ratio=0\.3: with decode='auto' decoding runs dense.*decode='step'",
    ),
    "position": ({"history": "position"}, r"history='position'"),
    "guard": ({"guard": True}, r"guard=True"),
    "ranking": ({"probe": pp_fx.ProbeConfig(ranking="residual")}, r"probe\.ranking='residual'.*set it to 'even'"),
    "samples": ({"probe": pp_fx.ProbeConfig(sample_fraction=0.5)}, r"probe\.sample_fraction=0\.5"),
    "first": ({"probe": pp_fx.ProbeConfig(first_position="always")}, r"probe\.first_position='always'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_fit(name):
    changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        check_settings(pp_fx.ProbePruningConfig(**changes), "an engine")


def test_settings_that_fit():
    for decode in ("auto", "dense", "step", "rolling"):
        check_settings(pp_fx.ProbePruningConfig(decode=decode, step_probe=None), "an engine")
    check_settings(pp_fx.ProbePruningConfig(decode="step", decode_ratio=0.4), "an engine")
    check_settings(pp_fx.ProbePruningConfig(probe=None), "an engine")


def test_the_place_is_named():
    with pytest.raises(ConfigError, match=r"set it to 0 in config\.json"):
        check_settings(pp_fx.ProbePruningConfig(attention_ratio=0.1), "an engine", " in config.json")
