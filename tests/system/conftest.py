"""What tests of exported files share."""

import shutil

import pytest

from pp_fx.export import build_ort_ops


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The native kernels, built in a folder of their own."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("the native kernels need a C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PP_FX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield build_ort_ops()
