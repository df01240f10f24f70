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

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.evaluate import evaluate
from pp_fx.macs import count_macs
from pp_fx.ranks import of_all
from pp_fx.rewrite.layer import layers_of
from pp_fx.runtime import select
from pp_fx.runtime.probe import choose_rows
from pp_fx.runtime.state import states_of
from pp_fx.shards import is_distributed

from .families import FAMILIES, build
from .models import tiny_llama
from .shard_errors import errors, refusals
from .shards import CLOSE, IDS, JOINT, PLANS, SEPARABLE, TEXT, load, logits, save, transformed


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


def steps_choose_by_shard(model, whole):
    """decode="step": each token takes its strongest channels of every shard; in one process all others are zeroed."""
    size = dist.get_world_size()
    transformed(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0, decode="step", decode_ratio=0.4))
    kept, hooks = [state.step_units for state in states_of(model) if state.kind == "mlp"], []
    assert all(k < model.config.intermediate_size // size for k in kept)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for one, cache in zip((model, whole), caches, strict=True):
        logits(one, past_key_values=cache)
    for layer, count in zip(whole.model.layers, kept, strict=True):
        gates = {}

        def keep(module, args, out, gates=gates):
            gates["of"] = torch.nn.functional.silu(out)

        def zeroed(module, args, gates=gates, count=count):
            strength = (gates["of"].abs() * module.weight.norm(dim=0)).unflatten(-1, (size, -1))
            best = torch.zeros_like(strength).scatter(-1, strength.topk(count).indices, 1)
            return (args[0] * best.flatten(-2),)

        hooks += [layer.mlp.gate_proj.register_forward_hook(keep)]
        hooks += [layer.mlp.down_proj.register_forward_pre_hook(zeroed)]
    for token in IDS.flip(1)[:, :3].split(1, 1):
        found, expected = (logits(m, token, past_key_values=c) for m, c in zip((model, whole), caches, strict=True))
        torch.testing.assert_close(found, expected, **CLOSE)
    for hook in hooks:
        hook.remove()
    pp_fx.restore(model)


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


def compiled(model, whole):
    """Blocks that are compiled, as one graph each, give what the uncompiled ones give.

    Of the whole model torch 2.13 compiles the prompt; at the next shape transformers' embedding fails, pruned or not.
    """
    transformed(model, SEPARABLE)

    def run():
        cache = DynamicCache(config=model.config)
        return [logits(model, part, past_key_values=cache) for part in (IDS, IDS[:, :1], IDS[:, 1:2])]

    with pp_fx.history_frozen(model), torch._dynamo.config.patch(recompile_limit=64):
        expected = run()
        for layer in layers_of(model):
            layer.compile(fullgraph=True)
        torch.testing.assert_close(run(), expected, **CLOSE)


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
    if name == "Llama":
        steps_choose_by_shard(model, whole)
    return model, whole


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
