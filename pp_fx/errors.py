"""Exceptions of pp_fx. Every message names the argument, the value and the remedy."""


class PpFxError(Exception):
    """Base class of every error that pp_fx raises on purpose."""


class ConfigError(PpFxError, ValueError):
    """A configuration field has a wrong type or value, or the configuration has unknown fields."""


class UnsupportedModelError(PpFxError, ValueError):
    """The model cannot be transformed: it has no decoder layers, or something hides its layers from capture."""


class StateError(PpFxError, RuntimeError):
    """The model is in the wrong state for the call (transformed twice, not transformed, training with dropout)."""


class UnknownAttributeError(StateError, AttributeError):
    """An attention function asks for more than pruned heads have (an AttributeError, so that getattr has a default)."""


class CaptureError(UnsupportedModelError):
    """A decoder layer does something that the captured graph cannot represent."""


class PassError(PpFxError, RuntimeError):
    """Graph passes were run in another order than they stand on each other, or one of them has a fault."""


class InputError(PpFxError, ValueError):
    """Data given to calibration, evaluation or the command line cannot be used."""


class ExportError(PpFxError, RuntimeError):
    """A model cannot be exported, or an exported folder is damaged, incomplete or not one of ours."""


class RequirementError(PpFxError, ImportError):
    """A package that pp_fx stands on is too old."""


class BuildError(PpFxError, RuntimeError):
    """A library of native kernels cannot be compiled, or a file is none of ours."""
