"""What the exporter writes out and onnxruntime's kernels can do by themselves."""

from __future__ import annotations

from onnxscript import ir


class SkipSingleSplits(ir.passes.InPlacePass):
    """A split into one part copies its input: leave it out."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Read the input itself."""
        found = [node for node in model.graph if node.op_type == "Split" and len(node.outputs) == 1]
        for node in found:
            source = node.inputs[0]
            assert source is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], source, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, bool(found))


class WidenBfloat16(ir.passes.InPlacePass):
    """What the model computes in bf16 runs in fp32 and is rounded (alibi): onnxruntime's CPU knows no bf16."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put casts around the nodes."""
        found = [node for node in model.graph if _computes_bf16(node)]
        for node in found:
            _widen(model.graph, node)
        return ir.passes.PassResult(model, bool(found))


def _computes_bf16(node: ir.Node) -> bool:
    return node.op_type not in ("Cast", "Constant", "ConstantOfShape") and any(
        _is_bf16(v) for v in (*node.inputs, *node.outputs)
    )


def _widen(graph: ir.Graph, node: ir.Node) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and _is_bf16(value):
            wide = _cast(value, ir.DataType.FLOAT)
            node.replace_input_with(index, wide.outputs[0])
            graph.insert_before(node, wide)
    for value in [v for v in node.outputs if _is_bf16(v)]:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        narrow = _cast(value, ir.DataType.BFLOAT16)
        ir.convenience.replace_all_uses_with(value, narrow.outputs[0])
        narrow.replace_input_with(0, value)
        graph.insert_after(node, narrow)


def _is_bf16(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.BFLOAT16


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)])
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
    node.outputs[0].name = f"{value.name}_{dtype.name.lower()}"
    return node


class GroupHeads(ir.passes.InPlacePass):
    """Attention reads the key/value heads as they are: the operator itself shares them among groups of query heads.

    https://onnx.ai/onnx/operators/onnx__Attention.html, "Grouped Query Attention".
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Read what transformers' `repeat_kv` reads."""
        modified = False
        for node in model.graph:
            if node.op_type != "Attention":
                continue
            keys, values = (_before_repeat(node.inputs[i]) for i in (1, 2))
            if keys is not None and values is not None:
                node.replace_input_with(1, keys)
                node.replace_input_with(2, values)
                modified = True
        return ir.passes.PassResult(model, modified)


def _before_repeat(value: ir.Value | None) -> ir.Value | None:
    """k of Reshape(Expand(Unsqueeze(k, 2))), transformers' `repeat_kv`; None for anything else."""
    for op in ("Reshape", "Expand", "Unsqueeze"):
        node = None if value is None else value.producer()
        if node is None or node.op_type != op:
            return None
        last, value = node, node.inputs[0]
    axes = last.inputs[1].const_value if last.inputs[1] is not None else None
    return value if axes is not None and axes.numpy().tolist() == [2] else None
