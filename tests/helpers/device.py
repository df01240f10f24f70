"""`PP_FX_TEST_DEVICE=cuda pytest`: the same tests on another device.

Models go there after they were made on the CPU, so that they have the same weights, and so does every tensor that a
test makes: test modules see a `torch` whose constructors end on the device. The project's own code sees the real one.
"""

import os
import types

import torch

DEVICE = os.environ.get("PP_FX_TEST_DEVICE", "cpu")
_CONSTRUCTORS = ("arange", "empty", "eye", "full", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros")


class _OnDevice(types.ModuleType):
    """torch for test modules."""

    def __getattr__(self, name):
        found = getattr(torch, name)
        return _moved(found) if name in _CONSTRUCTORS else found


def _moved(make):
    def made(*args, **kwargs):
        return make(*args, **kwargs) if "device" in kwargs else make(*args, **kwargs).to(DEVICE)

    return made


def put_on_device(module):
    """Let a test module make its tensors on the device."""
    if DEVICE != "cpu" and getattr(module, "torch", None) is torch:
        module.torch = _OnDevice("torch")


def to_device(model):
    """A model, moved."""
    return model.to(DEVICE)
