"""Products, gathers and steps read quantized weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxscript import ir

from ..functions import DOMAIN
from ..outside import initializer
from ..quantized_weights import BLOCK, Quantized, QuantizedRows

_MICROSOFT = "com.microsoft"
_ACCURACY = 4
"""MatMulNBits' `accuracy_level`: products with x rounded to int8 in blocks, sums in fp32."""


class QuantizeWeights(ir.passes.InPlacePass):
    """Replace initializers of a merged graph by codes and scales, and whatever reads them by what reads those.

    Whole products become `MatMulNBits`, products with gathered rows `QuantizedRows`, steps `QuantizedStrongest`; any
    other reader gets the widened numbers.

    Args:
        quantized: by parameter name; the graph may have a weight as it is, transposed (`.T`), or both.
    """

    def __init__(self, quantized: dict[str, Quantized]) -> None:
        self.quantized = quantized

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every reader; the initializers that nothing reads any more go."""
        graph = model.graph
        weights = {name: _Weight.of(graph, name, made) for name, made in self.quantized.items()}
        for node in list(ir.traversal.RecursiveGraphIterator(graph)):
            if node.domain == DOMAIN and node.op_type in ("Strongest", "StrongestOutput"):
                _replace_step(node, weights)
        for name, weight in weights.items():
            for value in [v for v in (graph.initializers.get(n) for n in (name, f"{name}.T")) if v is not None]:
                for node, index in _readers(value):
                    weight.rewrite(node, index, turned=value.name != name)
                del graph.initializers[str(value.name)]
        model.opset_imports[_MICROSOFT] = 1
        return ir.passes.PassResult(model, bool(weights))


class _Weight:
    """One weight's codes and scales in the graph, and the readers that take them."""

    def __init__(self, made: Quantized, codes: ir.Value, scales: ir.Value) -> None:
        self.made, self.codes, self.scales = made, codes, scales
        self.is_rows = isinstance(made, QuantizedRows)

    @classmethod
    def of(cls, graph: ir.Graph, name: str, made: Quantized) -> _Weight:
        """Adds the initializers `<name>.codes` and `<name>.scales`."""
        codes, scales = (initializer(f"{name}.{part}", getattr(made, part)) for part in ("codes", "scales"))
        graph.register_initializer(codes)
        graph.register_initializer(scales)
        return cls(made, codes, scales)

    def rewrite(self, node: ir.Node, index: int, turned: bool) -> None:
        """`turned`: the node reads the weight transposed, [in, out]."""
        kind = node.op_type
        if kind == "Transpose" and not turned and _all_multiply(node):
            for product, _ in _readers(node.outputs[0]):
                self._replace_product(product)
            _remove(node)
        elif kind == "MatMul" and index == 1 and turned:
            self._replace_product(node)
        elif kind == "Gemm" and index == 1 and _is_plain_gemm(node, turned):
            self._replace_product(node, bias=node.inputs[2] if len(node.inputs) > 2 else None)
        elif kind == "Gather" and index == 0 and _axis(node) == 0 and turned != self.is_rows:
            self._replace_gather(node)
        else:
            node.replace_input_with(index, self._widened(node, turned))

    def _replace_product(self, node: ir.Node, bias: ir.Value | None = None) -> None:
        """x weight^T of the whole weight."""
        x = node.inputs[0]
        if isinstance(self.made, QuantizedRows):
            outputs, blocks = self.made.scales.shape
            numbers = {"N": outputs, "K": blocks * BLOCK, "bits": self.made.bits, "block_size": BLOCK}
            attributes = [ir.AttrInt64(k, v) for k, v in {**numbers, "accuracy_level": _ACCURACY}.items()]
            product = ir.Node(_MICROSOFT, "MatMulNBits", [x, self.codes, self.scales], attributes)
        else:
            product = ir.Node(DOMAIN, "QuantizedOutput", [x, self.codes, self.scales])
        _put(node, [product], bias)

    def _replace_gather(self, node: ir.Node) -> None:
        """Rows for an input projection, channels for an output projection (or an embedding)."""
        index = node.inputs[1]
        assert index is not None
        if not self.is_rows:
            numbers = ir.Node("", "Gather", [self.codes, index], [ir.AttrInt64("axis", 0)])
            wide = ir.Node("", "Cast", [numbers.outputs[0]], [ir.AttrInt64("to", ir.DataType.FLOAT)])
            _put(node, [numbers, wide, ir.Node("", "Mul", [wide.outputs[0], self.scales])])
            return
        turns = [reader for reader, _ in _readers(node.outputs[0])]
        if turns and all(t.op_type == "Transpose" and _all_multiply(t) for t in turns):
            for product in [reader for turn in turns for reader, _ in _readers(turn.outputs[0])]:
                inputs = [product.inputs[0], self.codes, self.scales, index]
                _put(product, [ir.Node(DOMAIN, "QuantizedRows", inputs)])
            for left in (*turns, node):
                _remove(left)
            return
        _put(node, self._gathered(index, rank=2 if index.shape is None else len(index.shape)))

    def _gathered(self, index: ir.Value, rank: int) -> list[ir.Node]:
        """Widened rows [.., K]."""
        last = _constant([-1])
        flat = ir.Node("", "Unsqueeze", [self.scales, last.outputs[0]])
        numbers = {"gather_axis": 0, "quantize_axis": 2, "block_size": BLOCK, "bits": self.made.bits}
        attributes = [ir.AttrInt64(k, v) for k, v in numbers.items()]
        rows = ir.Node(_MICROSOFT, "GatherBlockQuantized", [self.codes, index, flat.outputs[0]], attributes)
        shape = _constant([*(0,) * rank, -1])
        joined = ir.Node("", "Reshape", [rows.outputs[0], shape.outputs[0]])
        return [last, flat, rows, shape, joined]

    def _widened(self, node: ir.Node, turned: bool) -> ir.Value:
        """The numbers of the whole weight, as the node reads them."""
        if self.is_rows:
            everything = _constant(list(range(len(self.made.codes))))
            nodes = [everything, *self._gathered(everything.outputs[0], rank=1)]
        else:
            wide = ir.Node("", "Cast", [self.codes], [ir.AttrInt64("to", ir.DataType.FLOAT)])
            nodes = [wide, ir.Node("", "Mul", [wide.outputs[0], self.scales])]
        if turned == self.is_rows:
            nodes.append(ir.Node("", "Transpose", [nodes[-1].outputs[0]], [ir.AttrInt64s("perm", [1, 0])]))
        _insert(node, nodes)
        return nodes[-1].outputs[0]


def _replace_step(node: ir.Node, weights: dict[str, _Weight]) -> None:
    """`Strongest` of quantized projections: strength, factor, x, codes and scales of up, bias, those of down, count."""
    *inputs, down, count = node.inputs
    if node.op_type == "Strongest":
        *inputs, up, bias = inputs
        of_up = weights[str(up.name)]  # type: ignore[union-attr]
        inputs += [of_up.codes, of_up.scales, bias]
    of_down = weights[str(down.name).removesuffix(".T")]  # type: ignore[union-attr]
    _put(node, [ir.Node(DOMAIN, f"Quantized{node.op_type}", [*inputs, of_down.codes, of_down.scales, count])])


def _readers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Nodes that read a value, and as which input; those that a representative has left behind are in no graph."""
    return [(node, index) for node, index in value.uses() if node.graph is not None]


def _remove(node: ir.Node) -> None:
    """A node that nobody reads any more, but what a representative has left behind."""
    for reader, index in node.outputs[0].uses():
        reader.replace_input_with(index, None)
    node.graph.remove(node, safe=True)  # type: ignore[union-attr]


def _all_multiply(turn: ir.Node) -> bool:
    """Whether all that reads a transposed weight multiplies with it."""
    uses = _readers(turn.outputs[0])
    return bool(uses) and all(reader.op_type == "MatMul" and index == 1 for reader, index in uses)


def _is_plain_gemm(node: ir.Node, turned: bool) -> bool:
    numbers = {name: node.attributes[name].value for name in node.attributes}
    scaled = numbers.get("alpha", 1.0) != 1.0 or numbers.get("beta", 1.0) != 1.0 or numbers.get("transA", 0)
    return not scaled and bool(numbers.get("transB", 0)) != turned


def _axis(node: ir.Node) -> int:
    return int(node.attributes["axis"].as_int()) if "axis" in node.attributes else 0


def _constant(numbers: Sequence[int]) -> ir.Node:
    return ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.array(numbers, np.int64)))])


def _insert(before: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Nodes before another, named after it."""
    name = before.outputs[0].name
    for place, node in enumerate(nodes):
        node.name = f"{name}/quantized{place}"
        node.outputs[0].name = node.outputs[0].name or node.name
    before.graph.insert_before(before, nodes)  # type: ignore[union-attr]


def _put(node: ir.Node, nodes: Sequence[ir.Node], bias: ir.Value | None = None) -> None:
    """The last of `nodes`, with a bias added, takes the node's place."""
    if bias is not None:
        nodes = [*nodes, ir.Node("", "Add", [nodes[-1].outputs[0], bias])]
    _insert(node, nodes)
    old, made = node.outputs[0], nodes[-1].outputs[0]
    name, made.type, made.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)  # type: ignore[union-attr]
    made.name = name
