"""The names of an exported file."""

import pytest

from pp_fx.export import names


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("past_key_values.3.key", "present.3.key"),
        ("pp_compact.0.mlp.up_bias", "present_compact.0.mlp.up_bias"),
        ("pp_history.12.attention.energy", "present_history.12.attention.energy"),
    ],
)
def test_an_output_is_fed_back_as_its_input(given, output):
    assert names.output_of(given) == output
    assert names.input_of(output) == given


def test_a_kind_is_the_whole_first_part():
    assert names.of_kind("present.0.key", names.PRESENT)
    assert not names.of_kind("present_compact.0.mlp.up", names.PRESENT)
    assert names.of_kind("pp_compact.0.mlp.up", names.HISTORY, names.COMPACT)
    assert not names.of_kind(None, names.COMPACT)


def test_names_are_made_and_moved():
    assert names.key_values(names.PAST, 2)[2:] == ["past_key_values.1.key", "past_key_values.1.value"]
    assert names.of_group(names.COMPACT, "3.mlp", "up") == "pp_compact.3.mlp.up"
    assert names.state_tensor("mlp", "energy") == "pp_mlp.energy"
    assert names.position_of("layer.12.mlp.up_proj.weight") == 12
    assert names.position_of("input_ids") is None
    assert names.rename("layer.1.mlp.up_proj.weight", 1, 20) == "layer.20.mlp.up_proj.weight"
