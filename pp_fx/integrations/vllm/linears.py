"""What vLLM calls in place of the two linear layers of an MLP: its own methods, and a `PrunedMlp` between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from .mlp import PrunedMlp


class GateUpMethod(UnquantizedLinearMethod):
    """Of the merged gate and up projection: runs the whole MLP, gives out a sample of what it was asked for."""

    def __init__(self, mlp: PrunedMlp) -> None:
        super().__init__()
        self.mlp = mlp

    def create_weights(self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int],
                       *args: Any, **kwargs: Any) -> None:  # fmt: skip
        """vLLM's, after a look at the sizes [C, C] of this rank."""
        self.mlp.take_inputs(output_partition_sizes)
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """vLLM's, which on a CPU packs the weights and frees the rows: they are kept before."""
        self.mlp.keep_inputs(layer.weight.data, getattr(layer, "bias", None))
        super().process_weights_after_loading(layer)
        self.mlp.dense_inputs = lambda x, bias: UnquantizedLinearMethod.apply(self, layer, x, bias)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, H] -> [T, 2 * SAMPLE]."""
        if self.mlp.compiled:
            return torch.ops.pp_fx.engine_mlp(x, bias, self.mlp.name)
        return self.mlp.run(x, bias)


class DownMethod(UnquantizedLinearMethod):
    """Of the down projection: hands out what the MLP has made."""

    def __init__(self, mlp: PrunedMlp) -> None:
        super().__init__()
        self.mlp = mlp

    def create_weights(self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int],
                       *args: Any, **kwargs: Any) -> None:  # fmt: skip
        """vLLM's, after a look at the sizes C and [H]."""
        self.mlp.take_output(input_size_per_partition, output_partition_sizes)
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """As of the gate and up projection; columns are gathered, so they lie contiguous."""
        self.mlp.keep_output(layer.weight.data)
        super().process_weights_after_loading(layer)
        self.mlp.dense_output = lambda z: UnquantizedLinearMethod.apply(self, layer, z)
        self.mlp.loaded()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The model's activation of the sample [T, SAMPLE] -> [T, H]."""
        if self.mlp.compiled:
            return torch.ops.pp_fx.engine_mlp_result(x, bias, self.mlp.name, self.mlp.hidden)
        return self.mlp.result(x, bias)
