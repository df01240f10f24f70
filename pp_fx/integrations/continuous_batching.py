"""`generate_batch` of a transformed model: what it cannot do is said where it is called.

Without it an error of the first step would end in transformers' log, raised in the thread that runs the steps.
"""

from __future__ import annotations

from typing import Any

from ..rewrite.engine_calls import check_compilation, check_ready
from ..rewrite.layer import settings_of
from ..rewrite.transform import SHADOWED
from ..runtime.state import states_of


def init_continuous_batching(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `init_continuous_batching`, which all ways to continuous batching go through, after a look.

    Args:
        model: a transformed model.
        *args, **kwargs: of transformers' method.

    Returns:
        Its ContinuousBatchingManager.

    Raises:
        ConfigError: the pruning's settings do not fit many requests in one row, or steps are to be compiled or recorded
            as CUDA graphs.
        StateError: the history alone is to select, and there is none.
    """
    states = states_of(model)
    if not any(state.prunes or state.steps for state in states):
        return type(model).init_continuous_batching(model, *args, **kwargs)
    settings = settings_of(model)
    check_ready(settings, states)
    attention = model.config._attn_implementation
    manager = type(model).init_continuous_batching(model, *args, **kwargs)
    try:
        check_compilation(manager.continuous_batching_config, settings)
    except BaseException:
        manager.destroy()
        model.set_attn_implementation(attention)
        raise
    return manager


SHADOWED["init_continuous_batching"] = init_continuous_batching
