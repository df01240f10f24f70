"""`model_stateful.onnx`: the same graph for hosts that can feed declared inputs alone, as JavaScript's runtimes do.

In `model.onnx` the compact weights are initializers that a host may override. onnxruntime-node and onnxruntime-web know
no overriding: they leave such inputs out without a word. Here they are inputs that every call has to give; empty ones
(no rows) make a call select.
"""

from __future__ import annotations

from pathlib import Path

from onnxscript import ir

from .folder import MODEL, STATEFUL
from .names import COMPACT, KEEP_LOGITS, WHOLE, of_kind


def write_stateful(directory: Path) -> None:
    """Write the stateful file beside `model.onnx`; both read the same weights."""
    model = ir.load(directory / MODEL)
    graph = model.graph
    choice = next(node for node in graph if node.op_type == "If")
    selects = choice.attributes["then_branch"].value
    inside = {id(node) for node in ir.traversal.RecursiveGraphIterator(selects)}
    compact = [v for v in graph.inputs if of_kind(v.name, COMPACT)]
    for value in compact:
        whole = ir.Value(
            name=str(value.name).replace(COMPACT, WHOLE, 1),
            type=value.type,
            shape=value.const_value.shape,  # type: ignore[union-attr,arg-type]
            const_value=value.const_value,
        )
        readers = [(node, index) for node, index in value.uses() if id(node) in inside]
        for node, index in readers:
            node.replace_input_with(index, whole)
        if readers:
            graph.register_initializer(whole)
    for value in (*compact, next(v for v in graph.inputs if v.name == KEEP_LOGITS)):
        del graph.initializers[str(value.name)]
        value.const_value = None
    if not compact:  # each token chooses for itself: nothing is fed back
        ir.save(model, directory / STATEFUL)
        return
    kept = next(v for v in compact if str(v.name).endswith(".kept"))
    size = ir.Node("", "Size", [kept])
    holds = ir.Node("", "Cast", [size.outputs[0]], [ir.AttrInt64("to", ir.DataType.BOOL)])
    empty = ir.Node("", "Not", [holds.outputs[0]])
    either = ir.Node("", "Or", [choice.inputs[0], empty.outputs[0]])
    steps = [size, holds, empty, either]
    for node, name in zip(steps, ("kept_size", "holds", "empty", "selects_now"), strict=True):
        node.outputs[0].name = f"pp_{name}"
    graph.insert_before(choice, steps)
    choice.replace_input_with(0, either.outputs[0])
    ir.save(model, directory / STATEFUL)
