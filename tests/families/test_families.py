"""Every decoder family: exact at ratio 0, pruned as configured, equal to the original model with zeroed channels."""

import importlib
from pathlib import Path

import pytest
import torch

import pp_fx
from pp_fx.rewrite.layer import layers_of
from tests.helpers.families import FAMILIES, build
from tests.helpers.family_checks import (
    equals_zeroed,
    exact_at_zero,
    pruned,
    selects_like_the_paper,
    some_ids,
    static_and_compiled,
    warned,
)
from tests.helpers.models import tiny_llama
from tests.helpers.zeroed import PRUNED, transformed

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
DISTINCT = ["Llama", "Gemma2", "OLMo2", "OPT", "Phi3", "GPT-NeoX", "GPT-2", "GPT-J", "Bloom", "Mixtral"]
"""One family for every way to find the channels; the others are marked slow (`make families` runs them all)."""
COMPILED = ["Llama", "Phi3", "GPT-2", "Bloom", "Mixtral"]
"""Those whose compiled decoding differs in kind: dynamo takes longest."""
NAMES = [pytest.param(name, marks=[] if name in DISTINCT else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", NAMES)
def test_ratio_zero_is_exact(name):
    exact_at_zero(name)


@pytest.mark.parametrize("name", ["Llama", "Gemma", "Phi3", "OPT", "GPT-2"])
def test_ratio_zero_is_exact_with_eager_attention(name):
    exact_at_zero(name, "eager")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Llama", "Phi3"])
def test_ratio_zero_is_exact_with_flash_attention(name):
    pytest.importorskip("flash_attn", reason="flash attention needs a CUDA device and its package")
    exact_at_zero(name, "flash_attention_2")


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_as_expected(name):
    family, model = FAMILIES[name], pruned(name)
    said = " ".join(message for message in warned(name) if "pp_fx leaves" in message)
    state = layers_of(model)[-1].states()
    for kind, expected in (("mlp", family.mlp), ("attention", family.attention)):
        if expected is True:
            assert state[kind].kept_units == state[kind].units - int(0.6 * state[kind].units) < state[kind].units
        else:
            assert kind not in state
            assert f"pp_fx leaves {kind} dense" in said
            assert expected in said
    assert bool(said) == (family.mlp is not True or family.attention is not True)
    reasons = " ".join(layers_of(model)[-1].reasons)
    assert ("the query projection runs whole" in reasons) == (family.query is not True)
    assert family.query is True or family.query in reasons
    counts = [f"{s.kept_units} of {s.units}" for s in (state.get("attention"), state.get("mlp")) if s]
    row = next(line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |"))
    assert [cell.strip() for cell in row.split("|") if " of " in cell][: len(counts)] == counts, "make families"


@pytest.mark.parametrize("name", NAMES)
def test_pruned_equals_the_original_with_zeroed_channels(name):
    equals_zeroed(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_selection_is_the_papers(name):
    selects_like_the_paper(name)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in COMPILED else pytest.mark.slow) for n in FAMILIES])
def test_a_static_cache_under_compile_gives_the_same(name):
    if FAMILIES[name].static:
        static_and_compiled(name)
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011 - transformers' own model fails, each in its way
            static_and_compiled(name, prunes=False)


def test_the_table_of_the_families_is_complete_and_green():
    rows = [line.split("|")[1:-1] for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    head, _, *rows = [[cell.strip() for cell in row] for row in rows]
    assert [row[0] for row in rows] == list(FAMILIES), "make families"
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        for check in ("exact at 0", "reference", "DynamicCache"):
            assert cells[check] == "yes", (row[0], check)
        assert cells["StaticCache, compiled"] == ("yes" if FAMILIES[row[0]].static else "not in transformers")
        assert float(cells["capture s"]) <= 3


@pytest.mark.parametrize("name", DISTINCT)
def test_restore_gives_the_original_back(name):
    model, ids = build(name), some_ids()
    strides = {key: p.stride() for key, p in model.named_parameters()}
    values = {key: p.clone() for key, p in model.named_parameters()}
    with torch.no_grad():
        dense = model(ids).logits
        transformed(model, PRUNED)(ids)
        pp_fx.restore(model)
        assert torch.equal(model(ids).logits, dense)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, values[key])
        assert parameter.stride() == strides[key]


def test_one_structure_is_captured_once(monkeypatch):
    module = importlib.import_module("pp_fx.rewrite.structures")
    captured, real = [], module.capture_layer

    def counting(*args):
        captured.append(args)
        return real(*args)

    monkeypatch.setattr(module, "capture_layer", counting)
    pp_fx.transform(tiny_llama(layers=12), PRUNED)
    assert len(captured) == 1
