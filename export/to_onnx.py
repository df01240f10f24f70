"""`onnx`: a transformed model as a folder that onnxruntime and the tools around it load."""

from __future__ import annotations

from typing import Any

from onnxscript import ir

from .functions import add_functions
from .merge import merge
from .ports import ports_of
from .trace import tensor_names, trace_decode, trace_prefill


def build(model: Any, opset: int) -> ir.Model:
    ports = ports_of(model)
    config = ports[0].state.config
    prefill = trace_prefill(model, ports, opset).model
    decode = trace_decode(model, ports, ports[0].layer.__dict__["pp_layer"].owner, opset).model
    history = {p.name: p.history() for p in ports if p.learns}
    compact = {p.name: p.dense() for p in ports}
    defaults = {}
    for prefix, groups in (("pp_history", history), ("pp_compact", compact)):
        tensors = [t for group in groups.values() for t in group.values()]
        defaults.update(
            zip(tensor_names(prefix, groups), (t.detach().contiguous().numpy() for t in tensors), strict=True)
        )
    merged = merge(prefill, decode, defaults, config.min_select_tokens)
    add_functions(merged)
    return merged
