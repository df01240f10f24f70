"""Functions that captured graphs call where the layer made a run-time decision: attention, KV cache, modules."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnknownAttributeError
from .plan import LayerInfo
from .selections import Selection
from .state import GroupState

_EAGER_ATTENTION: dict[type, Any] = {}
COLLECTOR = "transformers.utils.output_capturing"
"""Where the hooks come from with which transformers collects attention weights and hidden states."""
_SETTINGS: dict[type, tuple[str, ...]] = {}
"""Of an attention module's class: the names of its plain attributes. torch.compile cannot list them (torch 2.11)."""


def register_attention(module: nn.Module) -> None:
    """Remember what `AttentionView` and the eager core need of a module's class.

    That is the names of its numbers and texts, and the `eager_attention_forward` of the file that defines the class (or
    a base class).
    """
    names = (name for name, v in module.__dict__.items() if isinstance(v, int | float | str | type(None)))
    known = _SETTINGS.get(type(module), ())  # another model's modules of this class may have others
    _SETTINGS[type(module)] = tuple(dict.fromkeys((*known, *(name for name in names if not name.startswith("_")))))
    for cls in type(module).__mro__:
        found = getattr(inspect.getmodule(cls), "eager_attention_forward", None)
        if found is not None:
            _EAGER_ATTENTION[type(module)] = found
            return


def _attention_function(module: Any) -> Any:
    # config of a transformers module; the same look-up that the original layer makes
    default: Any = _EAGER_ATTENTION.get(type(module))
    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, default)


def attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, forwarded: dict[str, Any] | None, **kwargs: Any
) -> Tensor:
    """The model's own attention core, chosen at each call as the original layer does.

    Args:
        q, k, v: [B, heads, T, D], [B, kv heads, S, D], [B, kv heads, S, D].
        mask: whatever the model passed: tensor, None or BlockMask.
        forwarded: the layer's **kwargs.

    Returns:
        [B, T, heads, D].
    """
    result: Tensor
    result, weights = _attention_function(module)(module, q, k, v, mask, **{**(forwarded or {}), **kwargs})[:2]
    if weights is not None:
        _collect(module, result, weights)
    return result


def _collect(module: Any, result: Tensor, weights: Tensor) -> None:
    """Give attention weights to whoever collects them (output_attentions): transformers listens to the module."""
    for hook in module._forward_hooks.values():
        if getattr(hook, "__module__", "") == COLLECTOR:
            hook(module, (), (result, weights))


def kv_update(cache: Any, k: Tensor, v: Tensor, layer: LayerInfo) -> tuple[Tensor, Tensor]:
    """`past_key_values.update`, or the keys and values themselves without a cache."""
    return (k, v) if cache is None else cache.update(k, v, layer.index)


def call_module(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], forwarded: dict[str, Any] | None
) -> Tensor:
    """A module that capture could not see into, as the original layer calls it.

    Returns:
        Its result; of a tuple the first [B, T, H] tensor.
    """
    result = module(*args, **{**(forwarded or {}), **kwargs})
    if isinstance(result, Tensor):
        return result
    return next(r for r in result if isinstance(r, Tensor) and r.ndim == 3)


class AttentionView:
    """What an attention function reads from its module, with one key/value head per query head.

    `parameters`: those of the module that it reads (attention sinks).
    """

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        for name in _SETTINGS.get(type(module), ()):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))
        for name, parameter in parameters.items():
            setattr(self, name, parameter)
        self.config = module.config
        self.num_key_value_groups = 1

    def __getattr__(self, name: str) -> Any:
        raise UnknownAttributeError(
            f"the attention function reads {name} of its module, which does not stand for the kept heads alone; prune "
            "no heads (attention_ratio=0), or choose another attention implementation"
        )


def _per_head(module: nn.Module, heads: int) -> dict[str, Tensor]:
    """Parameters with one number per query head."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.shape[:1] == (heads,)}


def pruned_attention(
    state: GroupState,
    selection: Selection | None,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    forwarded: dict[str, Any] | None,
    **kwargs: Any,
) -> Tensor:
    """`attention` over the kept query heads only; `selection` None means all heads.

    Args:
        state: GroupState of the attention group (its `kv_head` maps query heads to key/value heads).
        selection: of the query heads, or None.
        q: [B, k, T, D]. k, v: [B, kv heads, S, D], whole.
    """
    if selection is None:
        return attention(module, q, k, v, mask, forwarded, **kwargs)
    assert state.kv_head is not None
    heads = state.kv_head.index_select(0, selection.kept)
    k, v = k.index_select(1, heads), v.index_select(1, heads)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == state.units and state.units > 1:
        mask = mask.index_select(1, selection.kept)
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.shape[:1] == (state.units,):
            kwargs[name] = value.index_select(0, selection.kept)
    call = _attention_function(module)
    sinks = {name: p.index_select(0, selection.kept) for name, p in _per_head(module, state.units).items()}
    view = AttentionView(module, sinks)
    out: Tensor = call(view, q, k, v, mask, **{**(forwarded or {}), **kwargs})[0]
    return out


def probe_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Tensor:
    """Attention of the probe rows, always through SDPA or the model's eager core.

    Args:
        q: [B', heads, T', D]; k, v: [B', kv heads, S, D], of the batch, or of the probe rows themselves (paper,
            section 3.1: S = T'); mask: [1 or B', 1, T', S].
    """
    name = "eager" if module.config._attn_implementation == "eager" else "sdpa"
    default: Any = _EAGER_ATTENTION.get(type(module))
    call = ALL_ATTENTION_FUNCTIONS.get_interface(name, default)
    groups = q.shape[1] // k.shape[1]
    if groups == 1 or mask.shape[1] > 1 or _per_head(module, q.shape[1]):
        whole: Tensor = call(module, q, k, v, mask, **kwargs)[0]
        return whole
    # GQA: the query heads of a key/value head as rows of one attention, so that no key is copied for each of them
    q, mask = q.unflatten(1, (-1, groups)).flatten(2, 3), mask.repeat(1, 1, groups, 1)
    out: Tensor = call(AttentionView(module, {}), q, k, v, mask, **kwargs)[0]
    by_head: Tensor = out.unflatten(1, (groups, -1)).permute(0, 2, 3, 1, 4)
    return by_head.flatten(2, 3)
