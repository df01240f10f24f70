"""Errors of arguments name the argument, the value and the remedy."""

import math

import pytest
import torch

from pp_fx.checks import check_choice, check_flag, check_ids, check_integers, check_list, check_number
from pp_fx.errors import ConfigError, InputError


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "2", None])
def test_integers(value):
    check_integers(1, batch=1, length=7)
    with pytest.raises(InputError, match=r"^batch=.* is not valid; give an integer >= 1$"):
        check_integers(1, batch=value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 2, 10**400, math.nan, math.inf, True, "0.5"])
def test_numbers(value):
    check_number("ratio", 0, 0, 1, high_open=True)
    with pytest.raises(ConfigError, match=r"^ratio=.*; give a number in \[0, 1\)$"):
        check_number("ratio", value, 0, 1, high_open=True, error=ConfigError)


def test_an_open_end_is_outside():
    with pytest.raises(InputError, match=r"give a number in \(0, 1\]"):
        check_number("share", 0, 0, 1, low_open=True)


@pytest.mark.parametrize("value", ["Sdpa", 1, True, ["sdpa"]])
def test_choices(value):
    check_choice("attention", None, ("sdpa", None))
    with pytest.raises(InputError, match=r"^attention=.* is unknown; choose one of 'sdpa', 'eager'$"):
        check_choice("attention", value, ("sdpa", "eager"))


def test_flags_and_lists():
    check_flag("guard", False)
    check_list("kinds", ["mlp"], "('mlp',)")
    with pytest.raises(InputError, match=r"guard=1 is not a boolean"):
        check_flag("guard", 1)
    for value in ("mlp", (), None):
        with pytest.raises(InputError, match=r"for example \('mlp',\)"):
            check_list("kinds", value, "('mlp',)")


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([[1]], "no tensor"),
        (torch.zeros(3, dtype=torch.int64), "of shape"),
        (torch.zeros(1, 3), "float32"),
        (torch.zeros(1, 0, dtype=torch.int64), "no token at all"),
        (torch.tensor([[0, 9]]), "token id 9"),
        (torch.tensor([[-1, 0]]), "token id -1"),
    ],
)
def test_token_ids(ids, reason):
    check_ids(torch.tensor([[0, 8]]), 9, "ids")
    with pytest.raises(InputError, match=reason):
        check_ids(ids, 9, "ids")
