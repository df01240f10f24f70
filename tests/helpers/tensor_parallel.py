"""Checks that every rank of `torchrun -m tests.helpers.tensor_parallel FOLDER NAMES` makes of tensor parallel models.

Every rank has the whole model, too, in which the same selection is made shard by shard, or dropped channels are zeroed.
"""

import dataclasses
import inspect
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.errors import ConfigError, InputError, StateError, UnsupportedModelError
from pp_fx.evaluate import evaluate
from pp_fx.macs import count_macs
from pp_fx.ranks import of_all
from pp_fx.rewrite import structures as structures_of
from pp_fx.rewrite.layer import layers_of
from pp_fx.runtime import select
from pp_fx.runtime.probe import choose_rows
from pp_fx.runtime.state import states_of
from pp_fx.shards import is_distributed

from .families import FAMILIES, build
from .models import tiny_llama

SEPARABLE = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, mlp_compensation="mean", attention_score=None,
    decode="sticky", probe=pp_fx.ProbeConfig(ranking="residual", token_fraction=0.2),
)  # fmt: skip
"""One process can make the same choice: no score and no compensation looks at two channels together."""
JOINT = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, compensation_min_tokens=64, decode="sticky",
    compensation_rank=12,
)  # fmt: skip
IDS = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(2, 97, (5, 40), generator=torch.Generator().manual_seed(1))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""transformers' own test of tensor parallel logits (tests/test_tensor_parallel_mixin.py)."""
PLANS = {
    "OPT": {"model.decoder.layers.*.fc1": "colwise", "model.decoder.layers.*.fc2": "rowwise"},
}  # transformers has none of its own for it


def load(folder, plan="auto"):
    """The tensor parallel model of a folder."""
    config = DistributedConfig(tp_plan=plan, tp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, local_files_only=True).eval()


def transformed(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pp_fx.transform(model, config)


def by_shard(model, function, *args, **kwargs):
    """The result of a function in which one process chooses as all ranks do: equally many units of every shard.

    `model`: the tensor parallel one, which has groups that are cut.
    """
    top, size = select.top, dist.get_world_size()
    cut = {state.units * size for state in states_of(model) if state.shards is not None}

    def sharded(scores, kept, exports):
        if len(scores) not in cut:
            return top(scores, kept, exports)
        best = [top(part, -(-kept // size), exports) for part in scores.chunk(size)]
        return torch.cat([one + i * (len(scores) // size) for i, one in enumerate(best)])

    select.top = sharded
    try:
        return function(*args, **kwargs)
    finally:
        select.top = top


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def rows_of(model, ids):
    """The positions that each group's probe takes in a call."""
    found = []

    def watched(*args):
        rows = choose_rows(*args)
        found.append(None if rows is None else rows.positions.tolist())
        return rows

    spaces = [inspect.unwrap(cls.forward).__globals__ for cls in {type(layer) for layer in layers_of(model)}]
    places = [(space, name) for space in spaces for name, value in space.items() if value is choose_rows]
    for space, name in places:
        space[name] = watched
    logits(model, ids)
    for space, name in places:
        space[name] = choose_rows
    return found


def equal_to_one_process(model, whole):
    """Without pruning the numbers of the whole model, and afterwards those of before."""
    before = logits(model)
    torch.testing.assert_close(before, logits(whole), **CLOSE)
    transformed(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0))
    torch.testing.assert_close(logits(model), before, **CLOSE)
    pp_fx.restore(model)
    assert torch.equal(logits(model), before)


def equal_to_selection_by_shard(model, whole):
    """Selection, history, generation, evaluation and calibration of one process that chooses by shard."""
    rank, size = dist.get_rank(), dist.get_world_size()
    transformed(model, SEPARABLE)
    transformed(whole, SEPARABLE)
    for mine, all_of_it in zip(states_of(model), states_of(whole), strict=True):
        assert (mine.kind, mine.prunes) == (all_of_it.kind, all_of_it.prunes)
    how = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    for ids in (IDS, TEXT, IDS):  # the history learns
        torch.testing.assert_close(logits(model, ids), by_shard(model, logits, whole, ids), **CLOSE)
    assert torch.equal(model.generate(IDS, **how), by_shard(model, whole.generate, IDS, **how))
    for one in (model, whole):
        pp_fx.calibrate(one, [IDS, TEXT], progress=False)
    check_history(model, whole, rank, size)
    with pp_fx.history_frozen(model), pp_fx.history_frozen(whole):
        found, expected = evaluate(model, TEXT, 2), by_shard(model, evaluate, whole, TEXT, 2)
    torch.testing.assert_close(found.per_sequence, expected.per_sequence, **CLOSE)
    rows = of_all(rows_of(model, IDS))
    assert any(rows[0])
    assert all(one == rows[0] for one in rows), "all ranks take the same rows"
    if all(state.shards is not None for state in states_of(model)):
        assert count_macs(model, 2, 40).ideal == pytest.approx(count_macs(whole, 2, 40).ideal, abs=0.02)
    pp_fx.restore(model)
    pp_fx.restore(whole)


def check_history(model, whole, rank, size):
    """A rank's history is its part of the whole one's."""
    for mine, all_of_it in zip(states_of(model), states_of(whole), strict=True):
        assert mine.prunes == all_of_it.prunes
        for name in ("energy", "mean") if mine.prunes else ():
            theirs = getattr(all_of_it, name)
            part = theirs.chunk(size)[rank] if mine.shards is not None else theirs
            torch.testing.assert_close(getattr(mine, name), part, rtol=1e-4, atol=1e-6)


def equal_to_zeroed(model, whole):
    """What each shard dropped is zeroed in one process, and each shard's compensation added; prompt and decoding."""
    transformed(model, JOINT)
    pp_fx.calibrate(model, TEXT, progress=False)
    cache, following = DynamicCache(config=model.config), IDS.flip(1)[:, :4]
    with torch.no_grad(), pp_fx.history_frozen(model):
        chosen = selections_on(model(IDS, use_cache=True).past_key_values).layers
        got = [logits(model, past_key_values=cache), logits(model, following, past_key_values=cache)]
    mine = {}
    for index, groups in chosen.items():
        for kind, selection in groups.items():
            made, group = selection.compensation, layers_of(model)[index].groups[kind]
            name = group.output.module
            parts = None if made.correction is None else made.dense_correction()
            sharded = layers_of(model)[index].states()[kind].shards is not None
            mine[index, name] = (selection.columns, made.vector, parts, group.output.in_features, sharded)
    assert {index for index, _ in mine} == {1, 2}
    every = of_all(mine)
    twins = [m for m in whole.modules() if type(m).__name__ == layers_of(model)[0].original_class.__name__]
    hooks = []
    for index, name in mine:
        shards = [one[index, name] for one in every] if mine[index, name][4] else [mine[index, name]]
        hooks += zero(twins[index].get_submodule(name), shards)
    cache = DynamicCache(config=whole.config)
    expected = [logits(whole, past_key_values=cache), logits(whole, following, past_key_values=cache)]
    scale = expected[0].abs().max().clamp(min=1)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one / scale, other / scale, atol=1e-4, rtol=0)
    for hook in hooks:
        hook.remove()
    pp_fx.restore(model)


def zero(projection, shards):
    """Hooks: the columns that no shard kept are zero, what stands in for them is added."""
    width = shards[0][3]
    kept = [columns + i * width for i, (columns, *_) in enumerate(shards)]
    mask = torch.zeros(width * len(shards)).index_fill(0, torch.cat(kept), 1)

    def before(_, args):
        return (args[0] * mask, *args[1:])

    def after(_, args, out):
        for columns, (_, vector, correction, *_) in zip(kept, shards, strict=True):
            out = out + vector + (0 if correction is None else args[0][..., columns] @ correction)
        return out

    return projection.register_forward_pre_hook(before), projection.register_forward_hook(after)


def saved_and_loaded(model, whole, folder):
    """Histories of many shards on one device and back, and of one device on many."""
    rank, size = dist.get_rank(), dist.get_world_size()
    transformed(model, JOINT)
    pp_fx.calibrate(model, TEXT, progress=False)
    model.save_pretrained(folder / "many")
    dist.barrier()
    again = load(folder / "many")
    assert pp_fx.is_transformed(again)
    for mine, other in zip(states_of(model), states_of(again), strict=True):
        assert (mine.calibrated, mine.shards is None) == (other.calibrated, other.shards is None)
        assert all(torch.equal(tensor, other.history()[name]) for name, tensor in mine.history().items())
    with pp_fx.history_frozen(model), pp_fx.history_frozen(again):
        torch.testing.assert_close(logits(again), logits(model), **CLOSE)
    one = AutoModelForCausalLM.from_pretrained(folder / "many", local_files_only=True).eval()
    assert all(torch.equal(p, dict(whole.named_parameters())[n]) for n, p in one.named_parameters() if "pp_" not in n)
    check_history(model, one, rank, size)
    alone = transformed(whole, JOINT)
    pp_fx.calibrate(alone, TEXT, progress=False)
    for mine, other in zip(states_of(one), states_of(alone), strict=True):
        if mine.directions is not None and mine.shards is None:
            check_directions(mine.directions, other.directions, size)
    if rank == 0:
        alone.save_pretrained(folder / "one")
    dist.barrier()
    check_history(load(folder / "one"), alone, rank, size)
    pp_fx.restore(model)
    pp_fx.restore(whole)


def check_directions(found, expected, size):
    """Within a shard the covariance is about that of one process; between shards nothing is known."""
    mine, other = (d.float().t() @ d.float() for d in (found, expected))
    part = len(mine) // size
    for i in range(size):
        span = slice(i * part, (i + 1) * part)
        assert (mine[span, span] - other[span, span]).norm() < 0.5 * other[span, span].norm()
    assert len(found) == len(expected)


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


def compiled(model, whole):
    """torch.compile of a tensor parallel model gives what the uncompiled one gives."""
    transformed(model, SEPARABLE)
    with torch.no_grad(), pp_fx.history_frozen(model):
        expected = model(IDS, use_cache=False).logits
        found = torch.compile(model)(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    pp_fx.restore(model)


def save(model, folder):
    """Written by one rank, read by all."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()


def of_family(name, size):
    """The family's tiny model with two heads for each rank."""
    config = FAMILIES[name].config()
    config.num_attention_heads = 2 * size
    FAMILIES[name] = dataclasses.replace(FAMILIES[name], config=lambda: config)
    return build(name)


def family(name, folder):
    """All checks of one family."""
    size = dist.get_world_size()
    made = tiny_llama(heads=2 * size, kv_heads=size, bias=True) if name == "Llama" else of_family(name, size)
    save(made, folder / name)
    whole = AutoModelForCausalLM.from_pretrained(folder / name, local_files_only=True).eval()
    model = load(folder / name, PLANS.get(name, "auto"))
    assert any(map(is_distributed, model.parameters()))
    equal_to_one_process(model, whole)
    equal_to_selection_by_shard(model, whole)
    equal_to_zeroed(model, whole)
    return model, whole


CHECKS = {"errors", "refusals", "saved", "compiled"}


def main(folder, names):
    dist.init_process_group("gloo")
    model = whole = None
    for name in names:
        if name == "errors":
            errors(model, folder)
        elif name == "refusals":
            refusals(folder)
        elif name == "saved":
            saved_and_loaded(model, whole, folder)
        elif name == "compiled":
            compiled(model, whole)
        else:
            model, whole = family(name, folder)
    Path(folder, f"done-{dist.get_rank()}").write_text(" ".join(names))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        main(Path(sys.argv[1]), sys.argv[2:])
