"""What vLLM calls in place of the two linear layers of an MLP: its own methods, and a `PrunedMlp` between them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, ops
from vllm.model_executor.layers.linear import LinearMethodBase

from .mlp import PrunedMlp
from .quantized import own_weight


class GateUpMethod(LinearMethodBase):
    """Of the merged gate and up projection: runs the whole MLP, gives out a sample of what it was asked for.

    Args:
        mlp: that it belongs to.
        own: vLLM's method for the layer, by how its weights are quantized.
    """

    def __init__(self, mlp: PrunedMlp, own: LinearMethodBase) -> None:
        self.mlp, self.own = mlp, own

    def create_weights(self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int],
                       *args: Any, **kwargs: Any) -> None:  # fmt: skip
        """vLLM's, after a look at the sizes [C, C] of this rank."""
        self.mlp.take_inputs(output_partition_sizes)
        self.own.create_weights(layer, input_size_per_partition, output_partition_sizes, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """vLLM's, which on a CPU packs the weights and frees the rows: they are kept before."""
        self.mlp.keep_inputs(own_weight(layer, self.own, self.mlp.name), getattr(layer, "bias", None))
        self.own.process_weights_after_loading(layer)
        self.mlp.dense_inputs = lambda x, bias: self.own.apply(layer, x, bias)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, H] -> [T, 2 * SAMPLE]."""
        if self.mlp.compiled:
            return ops.pp_fx.engine_mlp(x, bias, self.mlp.name)
        return self.mlp.run(x, bias)


class DownMethod(LinearMethodBase):
    """Of the down projection: hands out what the MLP has made; arguments as above."""

    def __init__(self, mlp: PrunedMlp, own: LinearMethodBase) -> None:
        self.mlp, self.own = mlp, own

    def create_weights(self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int],
                       *args: Any, **kwargs: Any) -> None:  # fmt: skip
        """vLLM's, after a look at the sizes C and [H]."""
        self.mlp.take_output(input_size_per_partition, output_partition_sizes)
        self.own.create_weights(layer, input_size_per_partition, output_partition_sizes, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """As of the gate and up projection."""
        self.mlp.keep_output(own_weight(layer, self.own, self.mlp.name))
        self.own.process_weights_after_loading(layer)
        self.mlp.dense_output = lambda z: self.own.apply(layer, z)
        self.mlp.loaded()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The model's activation of the sample [T, SAMPLE] -> [T, H]."""
        if self.mlp.compiled:
            return ops.pp_fx.engine_mlp_result(x, bias, self.mlp.name, self.mlp.hidden)
        return self.mlp.result(x, bias)
