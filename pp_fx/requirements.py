"""The versions that pp_fx needs, checked when this module is imported: first of all."""

import platform
from importlib import metadata

from packaging.version import parse

from ._version import __version__
from .errors import RequirementError

LEAST = {"torch": "2.11", "transformers": "5.17"}


def check_requirements() -> None:
    """Raises:

    RequirementError: a package is older than what pp_fx calls of it exists.
    """
    for name, least in LEAST.items():
        found = metadata.version(name)
        if parse(found).release < parse(least).release:
            raise RequirementError(f'{name} {found} is too old for pp_fx; run pip install -U "{name}>={least}"')


def versions() -> dict[str, str]:
    """The versions that figures depend on, by package; torch's own word names its build, too (2.13.0+cpu)."""
    import torch
    import transformers

    return {
        "pp_fx": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


check_requirements()
