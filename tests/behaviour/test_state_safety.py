"""What goes wrong around a model leaves it, and the disk, as they were: bad numbers, interrupts, threads, processes."""

import copy
import dataclasses
import inspect
import io
import os
import pickle
import threading

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DynamicCache

import pp_fx
from pp_fx.cache import selections_on
from pp_fx.errors import StateError
from pp_fx.rewrite.layer import layers_of
from pp_fx.runtime.state import states_of
from tests.helpers.models import tiny_llama

CONFIG = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, min_select_tokens=2)
SOLVING = {"compensation_min_tokens": 1}


def pruned(calibrated=True, **changes):
    model = pp_fx.transform(tiny_llama(), dataclasses.replace(CONFIG, **changes))
    if calibrated:
        pp_fx.calibrate(
            model, torch.randint(2, 97, (3, 20), generator=torch.Generator().manual_seed(7)), progress=False
        )
    return model


def history(model):
    """Every number that a model remembers."""
    return {
        (i, kind, key): value.clone()
        for i, layer in enumerate(layers_of(model))
        for kind, state in layer.states().items()
        for key, value in state._buffers.items()
        if value is not None
    }


def unchanged(model, before):
    after = history(model)
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def assert_whole_selection(cache, model):
    for index, groups in selections_on(cache).layers.items():
        for kind, selection in groups.items():
            kept, units = selection.kept.tolist(), layers_of(model)[index].states()[kind].units
            assert kept == sorted(set(kept))
            assert 0 <= kept[0] <= kept[-1] < units


# ---------------------------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("changes", [{}, SOLVING, {"probe": pp_fx.ProbeConfig(attention="rows")}])
def test_one_poisoned_sample_spoils_neither_the_history_nor_the_others(value, changes, calibrated, ids):
    model = pruned(calibrated, **changes)
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[1, 5] = value
    before, cache = history(model), DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(inputs_embeds=embeds, past_key_values=cache).logits
    assert out[[0, 2]].isfinite().all()
    assert all(v.isfinite().all() for v in history(model).values())
    assert_whole_selection(cache, model)
    assert unchanged(model, before)  # a call that is not finite is not learnt from
    with torch.no_grad():
        following = model(ids[:, :1], past_key_values=cache).logits
    assert following[[0, 2]].isfinite().all()


def test_norms_that_overflow_fp16_keep_out_of_the_history(ids):
    model = pruned().half()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(300)
            layer.mlp.gate_proj.weight.mul_(300)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert all(v.isfinite().all() for v in history(model).values())
    assert_whole_selection(cache, model)


@pytest.mark.parametrize("changes", [{}, SOLVING])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_sample_of_padding_alone_changes_nothing_for_the_others(calibrated, changes, ids):
    model = pruned(calibrated, **changes)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with torch.no_grad(), pp_fx.history_frozen(model):
        found = [model(x, attention_mask=mask).logits[[0, 2]] for x in (ids, ids.roll(1, 0)[[1, 0, 0]])]
        other = ids.clone()
        other[1] = 5
        again = model(other, attention_mask=mask).logits[[0, 2]]
    assert found[0].isfinite().all()
    torch.testing.assert_close(again, found[0])


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_batch_of_padding_alone_teaches_nothing(calibrated, ids):
    model = pruned(calibrated)
    before = history(model)
    with torch.no_grad():
        model(ids, attention_mask=torch.zeros_like(ids))
    assert unchanged(model, before)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_one_token_prompts(batch, calibrated):
    model = pruned(calibrated)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(torch.full((batch, 1), 5), past_key_values=cache).logits
        second = model(torch.full((batch, 1), 6), past_key_values=cache).logits
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert all(v.isfinite().all() for v in history(model).values())


# ------------------------------------------------------------------------------------------- exceptions, interrupts


class Interrupted(KeyboardInterrupt):
    pass


def raises(*args, **kwargs):
    raise Interrupted


def test_an_interrupted_forward_leaves_selection_and_results_as_they_were(ids):
    model = pruned()
    with torch.no_grad(), pp_fx.history_frozen(model):
        expected = model(ids).logits
        hook = model.model.layers[2].register_forward_pre_hook(raises)
        cache = DynamicCache(config=model.config)
        with pytest.raises(Interrupted):
            model(ids, past_key_values=cache)
        hook.remove()
        assert torch.equal(model(ids).logits, expected)
        fresh = DynamicCache(config=model.config)
        # the prompt's products read packed weights where a cache is given
        torch.testing.assert_close(model(ids, past_key_values=fresh).logits, expected, atol=1e-5, rtol=1e-4)


def test_an_interrupted_calibration_leaves_the_history_and_the_mode(ids):
    model = pruned()
    before, modes = history(model), [s.mode for s in states_of(model)]

    def batches():
        yield ids
        raise Interrupted

    with pytest.raises(Interrupted):
        pp_fx.calibrate(model, batches(), progress=False)
    hook = model.model.layers[2].register_forward_pre_hook(raises)
    with pytest.raises(Interrupted):
        pp_fx.calibrate(model, ids, progress=False)
    hook.remove()
    assert unchanged(model, before)
    assert [s.mode for s in states_of(model)] == modes
    assert not any(s.collector for s in states_of(model))


@pytest.mark.parametrize(
    ("place", "after"), [("install", 0), ("install", 2), ("compare_layers", 0), ("find_structures", 0)]
)
def test_an_interrupted_transform_leaves_the_model(place, after, ids, monkeypatch):
    model = tiny_llama()
    with torch.no_grad():
        expected = model(ids).logits
    strides = [p.stride() for p in model.parameters()]
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    module = inspect.unwrap(pp_fx.transform).__globals__
    calls, original = [], module[place]

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise Interrupted
        return original(*args, **kwargs)

    monkeypatch.setitem(module, place, interrupted)
    with pytest.raises(Interrupted):
        pp_fx.transform(model, CONFIG)
    monkeypatch.undo()
    assert [p.stride() for p in model.parameters()] == strides
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    pp_fx.transform(model, CONFIG)  # and it can be transformed


def test_an_interrupt_while_a_layer_is_rewritten_is_undone(ids, monkeypatch):
    model = tiny_llama()
    with torch.no_grad():
        expected = model(ids).logits
    names = {name for name, _ in model.named_modules()}
    monkeypatch.setattr("pp_fx.rewrite.layer._lay_out", raises)
    with pytest.raises(Interrupted):
        pp_fx.transform(model, CONFIG)
    monkeypatch.undo()
    assert {name for name, _ in model.named_modules()} == names
    assert not any("pp_fx" in type(m).__module__ for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    "place", ["pp_fx.calibration.history_file.save_file", "transformers.modeling_utils.safe_save_file"]
)
def test_an_interrupted_save_leaves_the_old_history_and_the_model(place, tmp_path, ids, monkeypatch):
    model = pruned()
    model.save_pretrained(tmp_path)
    old = (tmp_path / "pp_fx_history.safetensors").read_bytes()
    with torch.no_grad():
        model(ids)
    monkeypatch.setattr(place, raises)
    with pytest.raises(Interrupted):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "pp_fx_history.safetensors").read_bytes() == old
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert not hasattr(model.config, "quantization_config")


# ------------------------------------------------------------------------------------------------ threads, processes


def test_threads_share_a_model_whose_history_is_frozen(ids):
    """Selections live on the caches, so threads that bring their own do not meet."""
    model = pruned()
    prompts = [ids, ids.flip(1), ids.roll(3, 1)[:2], ids[:1]]

    def serve(prompt):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            first = model(prompt, past_key_values=cache).logits
            return torch.cat([first, model(prompt[:, :1], past_key_values=cache).logits], 1)

    with pp_fx.history_frozen(model):
        expected = [serve(p) for p in prompts]
        wrong = []

        def work(index):
            for _ in range(10):
                if not torch.equal(serve(prompts[index]), expected[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_computes_the_same(ids):
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    model = pruned()
    with torch.no_grad(), pp_fx.history_frozen(model):
        expected = model(ids).logits
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(model(ids).logits, expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_calibrate_takes_a_data_loader_with_workers(ids):
    model, other = pruned(), pruned()
    pp_fx.calibrate(model, DataLoader(list(ids), batch_size=2, num_workers=2), progress=False)
    pp_fx.calibrate(other, [ids[:2], ids[2:]], progress=False)
    assert unchanged(model, history(other))


@pytest.mark.parametrize("save", [lambda m: pickle.dumps(m), lambda m: torch.save(m, io.BytesIO())])
def test_pickle_is_refused_with_the_remedy(save):
    with pytest.raises(StateError, match="cannot be pickled"):
        save(pruned())


def test_what_pickle_refuses_deepcopy_and_state_dict_do(ids):
    model = pruned()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    assert layers_of(other)[1] is not layers_of(model)[1]
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad(), pp_fx.history_frozen(model), pp_fx.history_frozen(other):
        assert torch.equal(other(ids).logits, model(ids).logits)
