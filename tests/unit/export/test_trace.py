"""What the ONNX optimizer must leave alone."""

import pytest

pytest.importorskip("onnxscript")

from onnxscript import ir
from onnxscript.optimizer import optimize_ir

from pp_fx.export.trace import _tiny_sums_hidden


def adding(number):
    text = f"""
        <ir_version: 10, opset_import: ["": 23]>
        tiny (float[N, 4] x) => (float[N, 4] y) {{
            eps = Constant <value_float = {number}> ()
            sum = Add(x, eps)
            y = Sqrt(sum)
        }}"""
    return ir.from_onnx_text(text)


@pytest.mark.parametrize("number", ["1e-8", "1e-12", "1e-5"])
def test_a_tiny_epsilon_stays(number):
    """Helium's norm adds 1e-8, which the optimizer takes for 0: rows of zeros gave NaN."""
    model = adding(number)
    with _tiny_sums_hidden(model):
        optimize_ir(model)
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == ["Add", "Sqrt"]
    assert all(n.domain == "" for n in model.graph)
