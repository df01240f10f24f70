"""Pruning methods by name: Probe Pruning and its rivals, all on the same graphs.

Adding one: write a file with a `Score` (if it has its own) and a `Method`, and list it here.
"""

from .compensations import COMPENSATIONS, Compensation, Known
from .flap import flap
from .griffin import griffin
from .joint_heads import joint  # noqa: F401  (a score alone)
from .magnitude import magnitude
from .method import Method
from .probe_pruning import default, full_batch, paper
from .random_units import random
from .score import SCORES, Score, Statistics, column_sum
from .wanda_sp import wanda_sp

METHODS: dict[str, Method] = {
    m.name: m for m in (default, paper, full_batch, wanda_sp, flap, griffin, magnitude, random)
}

__all__ = ["COMPENSATIONS", "METHODS", "SCORES", "Compensation", "Known", "Method", "Score", "Statistics", "column_sum"]
