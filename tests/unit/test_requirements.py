"""Old versions are refused by name, before anything of them is used."""

from importlib import metadata

import pytest

from pp_fx.errors import RequirementError
from pp_fx.requirements import LEAST, check_requirements


@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize("old", ["1.0", "2.9", "2.10.1+cu128"])
def test_old_versions_are_refused_with_the_remedy(name, old, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda asked: old if asked == name else "99.0")
    with pytest.raises(RequirementError, match=f"{name} .* is too old for pp_fx; run pip install"):
        check_requirements()


@pytest.mark.parametrize("found", ["5.17.0", "5.17.0.dev0", "5.24.1+local"])
def test_new_enough_ones_pass(found, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda asked: found)
    check_requirements()
