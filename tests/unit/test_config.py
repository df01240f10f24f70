import math

import pytest

from pp_fx import ProbeConfig, ProbePruningConfig
from pp_fx.errors import ConfigError
from pp_fx.methods import METHODS


@pytest.mark.parametrize(
    "config",
    [
        ProbePruningConfig(),
        ProbePruningConfig.paper(0.4),
        ProbePruningConfig(history=None),
        ProbePruningConfig(probe=ProbeConfig(ranking="even")),
    ],
)
def test_json_round_trip(config):
    assert ProbePruningConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mlp_ratio", 1.0),
        ("mlp_ratio", -0.1),
        ("mlp_ratio", math.nan),
        ("mlp_ratio", "0.4"),
        ("mlp_ratio", True),
        ("attention_ratio", math.inf),
        ("skip_layers", -1),
        ("skip_layers", 1.5),
        ("round_to", 0),
        ("probe", {"token_fraction": 0.5}),
        ("history", "tokens"),
        ("momentum", 1.1),
        ("freeze_history", 1),
        ("score", "best"),
        ("score", ["ppsp"]),
        ("mlp_compensation", "median"),
        ("version", 2),
    ],
)
def test_bad_values_name_field_and_value(field, value):
    with pytest.raises(ConfigError) as caught:
        ProbePruningConfig(**{field: value})
    assert field in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "data", ["[]", "{", '{"ratio": 1}', '{"version": 99}', '{"probe": {"rows": 1}}', '{"probe": 3}']
)
def test_bad_json_is_refused(data):
    with pytest.raises(ConfigError):
        ProbePruningConfig.from_json(data)


@pytest.mark.parametrize(("field", "value"), [("ranking", "norm"), ("ranking", None), ("token_fraction", 0.0)])
def test_bad_values_of_the_probe_name_field_and_value(field, value):
    with pytest.raises(ConfigError) as caught:
        ProbeConfig(**{field: value})
    assert f"probe.{field}" in str(caught.value)
    assert repr(value) in str(caught.value)


def test_layer_ratio_is_the_mean_over_all_layers():
    ratios = ProbePruningConfig(mlp_ratio=0.4, skip_layers=3).layer_ratios("mlp_ratio", 30)
    assert ratios == pytest.approx([0.0] * 3 + [0.4 * 30 / 27] * 27)
    assert ProbePruningConfig.paper(0.4).layer_ratios("mlp_ratio", 30) == [0.0] * 3 + [0.44] * 27
    with pytest.raises(ConfigError, match=r"0\.95"):
        ProbePruningConfig(mlp_ratio=0.9).layer_ratios("mlp_ratio", 12)


@pytest.mark.parametrize(
    ("ratio", "layers", "skipped"),
    [(0.1, 30, 20), (0.2, 30, 20), (0.3, 24, 12), (0.4, 30, 10), (0.5, 30, 5), (0.6, 30, 3), (0.4, 3, 1), (0.2, 2, 1)],
)
def test_layers_that_are_skipped_where_the_configuration_leaves_it_open(ratio, layers, skipped):
    """As many as let the others drop 60%; two thirds at most, but 3 of 6 and more; of heads 3."""
    config = ProbePruningConfig(mlp_ratio=ratio, attention_ratio=0.1)
    carried = ratio * layers / (layers - skipped)
    assert config.layer_ratios("mlp_ratio", layers) == pytest.approx([0.0] * skipped + [carried] * (layers - skipped))
    assert config.layer_ratios("attention_ratio", layers).count(0.0) == min(3, layers // 2)


@pytest.mark.parametrize(("length", "positions"), [(1, 1), (3, 2), (64, 2), (81, 3), (512, 13), (1000, 25), (1001, 26)])
def test_probe_budget(length, positions):
    assert ProbeConfig().positions(length) == positions


def test_a_preset_is_what_the_command_line_takes():
    assert ProbePruningConfig.preset("default", 0.2) == ProbePruningConfig(mlp_ratio=0.2)
    assert ProbePruningConfig.preset("paper") == ProbePruningConfig.paper()
    assert ProbePruningConfig.preset("paper", 0.3, 0.1, skip_layers=1) == ProbePruningConfig.paper(
        0.3, 0.1, skip_layers=1
    )
    for name, method in METHODS.items():
        if name != "paper":
            assert ProbePruningConfig.preset(name, 0.3, 0.1) == method.config(0.3, 0.1)
    with pytest.raises(ConfigError, match="preset='papr' is unknown; choose one of 'default', 'paper'"):
        ProbePruningConfig.preset("papr")
