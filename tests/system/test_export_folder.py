"""The folder of an exported model: complete, whole or refused, put in place at once, and nothing left of a failure."""

import copy
import hashlib
import json
import math
import shutil

import onnx
import pytest
import torch
from onnxscript import ir

import pp_fx
from pp_fx.errors import ExportError, InputError, StateError
from pp_fx.export import OrtModel, check, to_onnx
from tests.helpers.models import pruned, tiny_llama


def test_the_folder_is_complete_and_check_rebuilds_the_model_from_it(exported):
    _, folder = exported
    names = {p.name for p in folder.iterdir()}
    expected = {"config.json", "generation_config.json", "genai_config.json", "README.md", "pp_fx.json"}
    assert names == {"model.onnx", "model_stateful.onnx", "model.onnx_data", *expected}
    onnx.checker.check_model(folder / "model.onnx")
    onnx.checker.check_model(folder / "model_stateful.onnx")
    found = check(folder)
    assert found.passed
    assert found.agreement == 1
    assert found.difference < 1e-4
    genai = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert (genai["num_hidden_layers"], genai["head_size"], genai["num_key_value_heads"]) == (3, 16, 2)


@pytest.fixture
def built(exported, monkeypatch):
    """The graph is read from the exported folder, not traced again."""
    monkeypatch.setattr(to_onnx, "build", lambda model, ports, opset: ir.load(exported[1] / "model.onnx"))


def test_an_export_replaces_an_earlier_one_alone(exported, built, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    model, folder = exported
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "stale").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(to_onnx, "write_configs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pp_fx.export.onnx(model, tmp_path / "out", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "stale").exists()
    pp_fx.export.onnx(model, tmp_path / "out", overwrite=True, verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx_data", "pp_fx.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "edited"])
def test_a_damaged_folder_is_refused(exported, tmp_path, file, damage):
    shutil.copytree(exported[1], tmp_path / "out")
    path = tmp_path / "out" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "edited":
        path.write_bytes(content.replace(b"mlp", b"mlq", 1) if file != "model.onnx_data" else b"\x00" + content[1:])
    if file == "pp_fx.json" and damage == "edited":
        path.write_text("[1]")
    with pytest.raises(ExportError, match=file.replace(".", r"\.")):
        OrtModel.from_pretrained(tmp_path / "out")


def test_bad_input_is_refused_and_leaves_nothing_behind(exported, tmp_path):
    model, _ = exported
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        pp_fx.export.onnx(model, tmp_path / "full")
    with pytest.raises(InputError, match="was not written by"):
        pp_fx.export.onnx(model, tmp_path / "full", overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        pp_fx.export.onnx(model, tmp_path / "full" / "file")
    with pytest.raises(InputError, match="opset=18"):
        pp_fx.export.onnx(model, tmp_path / "new", opset=18)
    with pytest.raises(StateError, match="not transformed"):
        pp_fx.export.onnx(tiny_llama(), tmp_path / "new")
    with pytest.raises(ExportError, match="prunes nothing"):
        pp_fx.export.onnx(pruned(tiny_llama(), pp_fx.ProbePruningConfig(0.0), False), tmp_path / "new")
    config = pp_fx.ProbePruningConfig(skip_layers=1, decode="sticky", drift_threshold=0.5)
    with pytest.raises(ExportError, match="drift_threshold"):
        pp_fx.export.onnx(pruned(tiny_llama(), config, False), tmp_path / "new")
    config = pp_fx.ProbePruningConfig(skip_layers=1, decode="rolling")
    with pytest.raises(ExportError, match="decode='rolling'"):
        pp_fx.export.onnx(pruned(tiny_llama(), config, False), tmp_path / "new")
    with pytest.raises(ExportError, match="bfloat16"):
        pp_fx.export.onnx(pruned(tiny_llama()).bfloat16(), tmp_path / "new")
    with pytest.raises(ExportError, match=r"pp_fx\.json"):
        OrtModel.from_pretrained(tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_guarded_model_is_compared_unguarded(exported, built, tmp_path):
    """A graph knows no machine: it prunes calls of every size."""
    model = copy.deepcopy(exported[0])
    for layer in model.model.layers[1:]:
        layer.pp_layer.guard_tokens = math.inf
    pp_fx.export.onnx(model, tmp_path / "out")
    assert model.model.layers[1].pp_layer.guard_tokens == math.inf


def test_a_failed_trace_leaves_model_and_disk_as_they_were(tmp_path, ids, monkeypatch):
    model = pruned(tiny_llama())
    with torch.no_grad(), pp_fx.history_frozen(model):
        before = model(ids).logits

    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(to_onnx, "trace_prefill", fail)
    with pytest.raises(ExportError, match="RuntimeError: broken"):
        pp_fx.export.onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with torch.no_grad(), pp_fx.history_frozen(model):
        assert torch.equal(model(ids).logits, before)


def test_weights_outside_of_the_folder_are_refused_even_with_matching_checksums(exported, tmp_path):
    """Whoever can write the graph can write the checksums."""
    folder = tmp_path / "out"
    shutil.copytree(exported[1], folder)
    shutil.copy(folder / "model.onnx_data", tmp_path / "secret")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    places = [e for t in graph.graph.initializer for e in t.external_data if e.key == "location"]
    assert places
    for place in places:
        place.value = "../secret"
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    settings = json.loads((folder / "pp_fx.json").read_text())
    settings["sha256"]["model.onnx"] = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "pp_fx.json").write_text(json.dumps(settings))
    with pytest.raises(ExportError, match="escapes model directory"):
        OrtModel.from_pretrained(folder)
