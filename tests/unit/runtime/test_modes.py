"""Attributes that change for a while come back, whatever happens."""

import types

import pytest

from pp_fx.runtime.modes import put_back


def test_values_hold_inside_and_names_may_change():
    one, other = types.SimpleNamespace(mode="run", kept=3), types.SimpleNamespace(mode="frozen", kept=4)
    with put_back([one, other], "kept", mode="calibrate"):
        assert (one.mode, other.mode) == ("calibrate", "calibrate")
        one.kept = 1
    assert (one.mode, one.kept) == ("run", 3)
    assert (other.mode, other.kept) == ("frozen", 4)


def test_they_come_back_after_an_exception():
    one = types.SimpleNamespace(mode="run")
    with pytest.raises(KeyboardInterrupt), put_back([one], mode="frozen"):
        raise KeyboardInterrupt
    assert one.mode == "run"


def test_an_attribute_that_is_not_there_changes_nothing():
    one, other = types.SimpleNamespace(mode="run"), types.SimpleNamespace()
    with pytest.raises(AttributeError), put_back([one, other], mode="frozen"):
        pass
    assert one.mode == "run"
