"""Errors of tensor parallel models: what one rank meets, all raise; what is refused, by name on all ranks."""

import pytest
import torch
import torch.distributed as dist

import pp_fx
from pp_fx.errors import ConfigError, InputError, StateError, UnsupportedModelError
from pp_fx.rewrite import structures as structures_of
from pp_fx.runtime.state import states_of

from .families import build
from .models import tiny_llama
from .shards import IDS, load, logits, save, transformed


def raised(kind, function, *parts):
    """What a call raises on this rank, after all ranks have come here."""
    with pytest.raises(kind) as found:
        function()
    for part in parts:
        assert part in str(found.value), str(found.value)
    dist.barrier()


def errors(model, folder):
    """What one rank alone meets, all raise; the model is left as it was, and nobody waits."""
    rank = dist.get_rank()
    before, find = logits(model), structures_of.capture_layer
    config = pp_fx.ProbePruningConfig(mlp_ratio=0.4)
    if rank == 1:

        def broken(*args):
            raise UnsupportedModelError("this rank cannot")

        structures_of.capture_layer = broken
    raised(UnsupportedModelError, lambda: pp_fx.transform(model, config), "this rank cannot")
    structures_of.capture_layer = find
    raised(ConfigError, lambda: pp_fx.transform(model, {"mlp_ratio": 0.4 + 0.1 * rank}), "config of rank 1")
    raised(ConfigError, lambda: pp_fx.transform(model, {"mlp_ratio": 7 if rank else 0.4}), "mlp_ratio=7")
    raised(ConfigError, lambda: pp_fx.transform(model, {"guard": True}), "guard=True", "set guard=False")
    raised(StateError, lambda: pp_fx.bench.bench(model, IDS), "tp_size=", "bench")
    assert not pp_fx.is_transformed(model)
    assert torch.equal(logits(model), before)
    transformed(model, config)
    wrong = IDS + 1000 * rank
    other = "batches[1] of rank 1 is not that of rank 0"
    refused = {"out of range": (wrong, [IDS, wrong]), other: ([IDS] * (1 + rank), [IDS, IDS.flip(1) if rank else IDS])}
    for part, given in refused.items():
        for batches in given:
            raised(InputError, lambda batches=batches: pp_fx.calibrate(model, batches, progress=False), part)
    assert not any(state.calibrated for state in states_of(model))
    with pytest.raises(StateError, match="no gradients"):
        model(IDS)
    pp_fx.restore(model)
    data_parallel = transformed(tiny_llama(), config)
    bad = torch.full((2, 8), 1000 if rank else 5)
    what = "token id 1000, out of range", *([] if rank else ["rank 1 failed"])
    raised(InputError, lambda: pp_fx.calibrate(data_parallel, bad, progress=False), *what)


def refusals(folder):
    """Plans, sizes and other parallelism that are not served, by name and on all ranks."""
    size = dist.get_world_size()
    gathered = {"model.layers.*.mlp.gate_proj": "colwise_gather_output", "model.layers.*.mlp.up_proj": "colwise"}
    save(tiny_llama(layers=1), folder / "gathered")
    model = load(folder / "gathered", gathered)
    raised(UnsupportedModelError, lambda: pp_fx.transform(model), "'colwise_gather_output'", "gate_proj")
    save(tiny_llama(heads=2 * size, kv_heads=1, layers=1), folder / "heads")
    heads = load(folder / "heads")
    raised(UnsupportedModelError, lambda: pp_fx.transform(heads), "num_key_value_heads=1", f"tp_size={size}")
    save(tiny_llama(intermediate=97, layers=1), folder / "channels")
    channels = load(folder / "channels")
    raised(UnsupportedModelError, lambda: pp_fx.transform(channels), "97 channels", f"tp_size={size}")
    save(build("OPT"), folder / "opt")
    with pytest.raises(ValueError, match="has no `tp_plan`"):
        load(folder / "opt")
    sharded = tiny_llama(layers=1)
    mesh = torch.distributed.init_device_mesh("cpu", (size,))
    torch.distributed.fsdp.fully_shard(sharded.model.layers[0], mesh=mesh)
    raised(UnsupportedModelError, lambda: pp_fx.transform(sharded), "FSDP2", "load the whole model on every rank")
