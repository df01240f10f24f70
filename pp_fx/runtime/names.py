"""Names of what `transform` puts into a model and a generation onto its KV cache."""

from __future__ import annotations

PREFIX = "pp_"
"""Of the attributes of a rewritten layer; a group's state is `pp_mlp` or `pp_attention`."""
LAYER = f"{PREFIX}layer"
"""Attribute of a rewritten layer: its `plan.LayerInfo`."""
MODEL = "pp_fx_info"
"""Attribute of the module that holds the rewritten layers: its `rewrite.call_check.ModelInfo`."""
SELECTIONS = "pp_fx_selections"
"""Attribute of a KV cache: its `selections.Selections`."""
STEP = "pp_fx_step"
"""Keyword argument of a layer under continuous batching: the `engine_step.EngineStep` that runs."""


def state_name(kind: str) -> str:
    """Attribute of a rewritten layer that is the state of its group of that kind."""
    return f"{PREFIX}{kind}"


def rows_name(position: int) -> str:
    """Buffer of a group's state: where the rows of its input projection at `position` lie scattered in a weight."""
    return f"rows_{position}"
