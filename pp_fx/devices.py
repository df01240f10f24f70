"""What depends on the kind of device: settings that a configuration leaves open (None) take these values there.

- `round_to`: kept channels are a multiple of it. A CPU's vectors hold 16 numbers of 4 bytes; cuBLAS takes 1.7 times as
  long as for the *whole* product where a count is no multiple of 8, and its tiles are 64 wide.
- `compensation_min_tokens`: from so many tokens on "least_squares" takes less than about 2% of a block's time. Its
  solve does not shrink with the batch, and the faster the device multiplies, the more tokens that takes
  (docs/research/speed.md for a CPU, docs/research/gpu.md).
- `step_batch`: up to so many sequences of a decode step leave out so many of the same channels that reading what they
  choose is faster than reading everything (docs/research/step.md). None yet on CUDA, where the choice takes as long as
  the bytes it saves (docs/research/gpu.md).
"""

from __future__ import annotations

from typing import NamedTuple


class Defaults(NamedTuple):
    """Of one kind of device; see the module."""

    round_to: int
    compensation_min_tokens: int
    step_batch: int


CPU = Defaults(round_to=16, compensation_min_tokens=2048, step_batch=4)
CUDA = Defaults(round_to=64, compensation_min_tokens=49152, step_batch=0)


def defaults(kind: str) -> Defaults:
    """Those of a device type ("cuda", "cpu", ..); types that nobody measured take the CPU's."""
    return CUDA if kind == "cuda" else CPU
