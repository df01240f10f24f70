"""What the exporter writes out and onnxruntime's kernels can do by themselves."""

from __future__ import annotations

from onnxscript import ir


def skip_single_splits(model: ir.Model) -> None:
    """A split into one part copies its input."""
    for node in list(model.graph):
        if node.op_type == "Split" and len(node.outputs) == 1:
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0], replace_graph_outputs=True)
            model.graph.remove(node, safe=True)


def group_heads(model: ir.Model) -> None:
    """Attention reads the key/value heads as they are: the operator itself shares them among groups of query heads.

    https://onnx.ai/onnx/operators/onnx__Attention.html, "Grouped Query Attention".
    """
    for node in model.graph:
        if node.op_type == "Attention":
            sources = [_before_repeat(node.inputs[i]) for i in (1, 2)]
            if None not in sources:
                node.replace_input_with(1, sources[0])
                node.replace_input_with(2, sources[1])


def _before_repeat(value: ir.Value | None) -> ir.Value | None:
    """k of Reshape(Expand(Unsqueeze(k, 2))), transformers' `repeat_kv`; None for anything else."""
    for op in ("Reshape", "Expand", "Unsqueeze"):
        node = None if value is None else value.producer()
        if node is None or node.op_type != op:
            return None
        last, value = node, node.inputs[0]
    axes = last.inputs[1].const_value if last.inputs[1] is not None else None
    return value if axes is not None and axes.numpy().tolist() == [2] else None
