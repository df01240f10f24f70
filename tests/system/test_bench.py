"""bench(): figures are consistent, nothing of the model changes, bad input is refused. Never a time itself."""

import dataclasses
import json

import pytest
import torch

import pp_fx
from pp_fx.bench import bench
from pp_fx.cli import bench as bench_module
from pp_fx.errors import InputError
from pp_fx.measure.bytes import block_bytes, key_value_bytes
from tests.helpers.command import run

CONFIG = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, round_to=1, decode="sticky")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_figures_are_consistent_and_the_model_is_untouched(llama, ids, phase):
    with torch.no_grad():
        before = llama(ids).logits
    threads = torch.get_num_threads()
    result = bench(llama, ids, CONFIG, phase=phase, new_tokens=4, repeats=3)
    assert result["ratio"] == result["pruned_ms"] / result["dense_ms"]
    assert 0 < result["ideal"] < 1
    assert result["ideal"] < result["with_head"]["ideal"] < 1  # the head is not pruned
    assert result["with_head"]["dense_ms"] > result["dense_ms"]
    assert result["static_ratio"] > 0
    assert result["masked_ratio"] > 0
    assert result["peak_memory_mb"] > 0
    if phase == "decode":
        assert result["compact_mb"] > 0
    else:
        assert result["ideal"] < result["ideal_with_probe"]
    assert not pp_fx.is_transformed(llama)
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, before)
    assert torch.get_num_threads() == threads


def test_nothing_pruned_is_ideal_one(llama, ids):
    for phase in ("prefill", "decode"):
        result = bench(llama, ids, pp_fx.ProbePruningConfig(mlp_ratio=0.0), phase=phase, new_tokens=2, repeats=1)
        assert result["ideal"] == result["with_head"]["ideal"] == 1
        assert result["static_ratio"] is result["masked_ratio"] is None


def test_dense_decoding_reads_all_bytes(llama, ids):
    result = bench(llama, ids, dataclasses.replace(CONFIG, decode="dense"), phase="decode", new_tokens=2, repeats=1)
    assert result["ideal"] == result["with_head"]["ideal"] == 1


def test_bytes_of_blocks_and_cache_are_those_of_the_tensors(llama, ids):
    whole = sum(p.numel() * 4 for layer in llama.model.layers for p in layer.parameters())
    pp_fx.transform(llama, CONFIG)
    dense, pruned = block_bytes(llama, ids.numel())
    states = [layer.pp_mlp for layer in llama.model.layers]
    assert dense == whole
    assert pruned == whole - sum(3 * 64 * 4 * (s.units - s.kept_units) for s in states)
    with torch.no_grad():
        cache = llama(ids, use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert key_value_bytes(llama.config, *ids.shape, 4) == held


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "train"}, "phase='train'"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"repeats": True}, "repeats=True"),
        ({"threads": -1}, "threads=-1"),
    ],
)
def test_bad_input_names_argument_and_value(llama, ids, changes, message):
    with pytest.raises(InputError, match=message):
        bench(llama, ids, CONFIG, **changes)
    with pytest.raises(InputError, match="ids"):
        bench(llama, ids + 1000, CONFIG)


def test_the_command_writes_the_promised_keys(folder):
    result = run("bench", folder, "--phase", "decode", "--batch", "2", "--length", "40", "--new-tokens", "3",
                 "--decode", "sticky", "--mlp-ratio", "0.3", "--dtype", "float32", "--json", "-")  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert {"dense_ms", "pruned_ms", "ratio", "ideal", "with_head", "peak_memory_mb", "versions"} <= set(data)
    assert {"ratio", "ideal"} <= set(data["with_head"])
    shown = run("bench", folder, "--batch", "2", "--length", "40", "--repeats", "1", "--mlp-ratio", "0.3",
                "--decode", "sticky")  # fmt: skip
    assert all(row in shown.output for row in ("decoder blocks", "with LM head", "static", "masked"))


def test_a_wrong_attention_implementation_is_refused(folder):
    result = run("bench", folder, "--attention", "flash")
    assert isinstance(result.exception, InputError)
    assert "attention='flash'" in str(result.exception)


@pytest.mark.parametrize(("options", "guard"), [((), None), (("--guard",), True), (("--no-guard",), False)], ids=str)
def test_the_guard_is_the_model_s_unless_it_is_named(folder, monkeypatch, options, guard):
    given = []
    monkeypatch.setattr(bench_module, "bench", lambda model, ids, config, **_: given.append(config) or {})
    result = run("bench", folder, "--length", "40", "--json", "-", *options)
    assert result.exit_code == 0, result.output
    assert [config.guard for config in given] == [guard]
