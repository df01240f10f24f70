"""A torch.compile backend that does to tensors what CUDA graphs do, on any device.

CUDA graph trees reuse the memory of a call's outputs when the next call begins. Here it is overwritten: numbers with
NaN, indices with a place that no weight has. Whoever reads what an earlier compiled call returned gets these.
"""

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

_outputs = []


def begin():
    """What the replay of a graph does first: the outputs of the calls before are gone."""
    for tensor in _outputs:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.int64, torch.int32):
            tensor.fill_(2**30)
        else:
            tensor.zero_()
    _outputs.clear()


def _compile(graph, inputs):
    def run(*args):
        results = graph(*args)
        # a mutated input keeps its address, as does what only looks at one
        given = {a.untyped_storage().data_ptr() for a in args if _writable(a)}
        _outputs.extend(r.detach() for r in results if _writable(r) and r.untyped_storage().data_ptr() not in given)
        return results

    return make_boxed_func(run)


def _writable(value):
    """An ordinary tensor: the opaque ones of a CPU's library are no memory of CUDA graphs."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


overwriting = aot_autograd(fw_compiler=_compile, inference_compiler=_compile)
