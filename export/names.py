"""The protocol of an exported file: names of its inputs and outputs.

| input | output, fed back as that input | |
|---|---|---|
| `past_key_values.3.key` | `present.3.key` | as the ecosystem's tools expect them |
| `pp_compact.3.mlp.up` | `present_compact.3.mlp.up` | the selection of a prompt as compact weights |
| `pp_history.3.mlp.energy` | `present_history.3.mlp.energy` | the history |

A trace names what belongs to a layer in the same way: the layer's (or its representative's) number is the second part.
"""

from __future__ import annotations

from ..runtime.names import state_name

INPUT_IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
LOGITS = "logits"
MIN_SELECT = "pp_min_select_tokens"
"""Input with a default: calls of at least so many tokens select."""
KEEP_LOGITS = "num_logits_to_keep"
"""Input with a default, 0: logits of so many last tokens alone are computed; 0 means all (as in transformers.js)."""
PAST, COMPACT, HISTORY = "past_key_values", "pp_compact", "pp_history"
PRESENT, PRESENT_COMPACT, PRESENT_HISTORY = "present", "present_compact", "present_history"
WHOLE = "pp_whole"
"""Initializers of the stateful file: the weights that a call without a selection runs."""
TRACED = "layer"
"""Of a weight or buffer of a representative, in a trace alone: `layer.1.mlp.up_proj.weight`."""
_OUTPUTS = {PAST: PRESENT, COMPACT: PRESENT_COMPACT, HISTORY: PRESENT_HISTORY}
_INPUTS = {output: name for name, output in _OUTPUTS.items()}


def of_kind(name: str | None, *kinds: str) -> bool:
    """Whether a name is one of these kinds (`PAST`, `COMPACT`, ..)."""
    return str(name).partition(".")[0] in kinds


def output_of(name: str) -> str:
    """The output that is fed back as this input."""
    kind, dot, rest = name.partition(".")
    return _OUTPUTS[kind] + dot + rest


def input_of(name: str) -> str:
    """The input as which this output is fed back."""
    kind, dot, rest = name.partition(".")
    return _INPUTS[kind] + dot + rest


def key_values(kind: str, layers: int) -> list[str]:
    """`past_key_values.0.key`, `past_key_values.0.value`, .. of so many layers."""
    return [key_value(kind, layer, part) for layer in range(layers) for part in ("key", "value")]


def key_value(kind: str, layer: int | str, part: str) -> str:
    """`past_key_values.3.key`."""
    return f"{kind}.{layer}.{part}"


def of_group(kind: str, group: str, key: str) -> str:
    """`pp_compact.3.mlp.up`: `group` is `3.mlp` (`ports.Port.name`)."""
    return f"{kind}.{group}.{key}"


def state_tensor(kind: str, key: str) -> str:
    """Path of a group's buffer inside its layer: `pp_mlp.energy`."""
    return f"{state_name(kind)}.{key}"


def position_of(name: str | None) -> int | None:
    """The representative or layer in a name: `past_key_values.1.key` -> 1."""
    parts = str(name).split(".")
    return int(parts[1]) if len(parts) > 2 and parts[1].isdigit() else None


def rename(name: str, old: int, new: int) -> str:
    """The same name of another layer."""
    prefix, _, rest = name.partition(f".{old}.")
    return f"{prefix}.{new}.{rest}"
