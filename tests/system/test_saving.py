"""save_pretrained and from_pretrained: pruned again to the bit, dense for everybody else; damaged folders refused."""

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pp_fx
from pp_fx.calibration.history_file import HISTORY_FILE, read_history
from pp_fx.errors import ConfigError, InputError, StateError
from pp_fx.integrations import hf_quantizer
from pp_fx.rewrite.layer import config_of
from tests.helpers.command import run
from tests.helpers.models import tiny_llama

CONFIG_HERE = pp_fx.ProbePruningConfig(
    mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1, compensation_min_tokens=100, decode="sticky"
)
STATIC = pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, probe=None)


def pruned(config=CONFIG_HERE, **changes):
    model = pp_fx.transform(tiny_llama(**changes), config)
    pp_fx.calibrate(model, torch.randint(2, 97, (4, 40), generator=torch.Generator().manual_seed(5)), progress=False)
    return model


@pytest.fixture
def folder(tmp_path):
    pruned().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def saved_folder(dense_folder, tmp_path):
    """A dense folder with a tokenizer, pruned and saved again."""
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.2)).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(dense_folder).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def logits(model, ids):
    with torch.no_grad(), pp_fx.history_frozen(model):
        return [model(ids).logits, model(ids[:, :5]).logits]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG_HERE,
        STATIC,
        pp_fx.ProbePruningConfig.paper(0.4, skip_layers=1),
        pp_fx.ProbePruningConfig(history=None, skip_layers=1),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_round_trip_is_exact(tmp_path, ids, config, tied):
    model = pp_fx.transform(tiny_llama(tied=tied), config)
    if config.history is not None:
        pp_fx.calibrate(model, ids, progress=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert pp_fx.is_transformed(loaded)
    assert config_of(loaded) == config
    for found, expected in zip(logits(loaded, ids), logits(model, ids), strict=True):
        assert torch.equal(found, expected)
    text = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(text, model.generate(ids, max_new_tokens=5, do_sample=False))
    assert not getattr(loaded, "hf_quantizer", None)
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids)[0], logits(loaded, ids)[0])


def test_weights_have_their_ordinary_names_and_shapes(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    dense = tiny_llama().state_dict()
    assert set(found) == set(dense)
    assert all(torch.equal(found[name], dense[name]) for name in dense)


def test_without_pp_fx_the_folder_is_the_dense_model_with_a_warning(folder, ids, tmp_path):
    torch.save(ids, tmp_path / "ids")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\nassert 'pp_fx' not in sys.modules\n"
        f"ids = torch.load({str(tmp_path / 'ids')!r})\n"
        f"with torch.no_grad(): torch.save(model(ids).logits, {str(tmp_path / 'out')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Unknown quantization type, got pp_fx" in done.stderr + done.stdout
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "out"), tiny_llama()(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", [{"dtype": torch.bfloat16}, {"device_map": "auto"}, {"attn_implementation": "eager"}])
def test_arguments_of_from_pretrained(folder, ids, given):
    loaded = AutoModelForCausalLM.from_pretrained(folder, **given)
    assert pp_fx.is_transformed(loaded)
    assert loaded.dtype == given.get("dtype", torch.float32)
    model = pruned()
    if "dtype" in given:
        model.to(torch.bfloat16)
    torch.testing.assert_close(logits(loaded, ids)[1], logits(model, ids)[1], atol=5e-2, rtol=5e-2)


def test_a_dense_folder_is_pruned_on_the_way_in(tmp_path, ids):
    tiny_llama().save_pretrained(tmp_path)
    adapter = pp_fx.ProbePruningHfConfig(CONFIG_HERE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=adapter)
    assert torch.equal(logits(loaded, ids)[0], logits(pp_fx.transform(tiny_llama(), CONFIG_HERE), ids)[0])
    assert not loaded.model.layers[1].pp_mlp.calibrated


@pytest.mark.parametrize("subfolder", ["", "inner"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_revision_of_a_hub_repository(tmp_path, ids, monkeypatch, subfolder, beside):
    """Two commits in a cache folder of the user's; the history may have to be fetched on its own."""
    import huggingface_hub

    repository = tmp_path / "cache" / "models--org--name"
    models = {"a" * 40: pruned(), "b" * 40: pruned(dataclasses.replace(CONFIG_HERE, mlp_ratio=0.2))}
    for (commit, model), ref in zip(models.items(), ("main", "v2"), strict=True):
        model.save_pretrained(repository / "snapshots" / commit / subfolder)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    asked = []
    if not beside:
        history = repository / "snapshots" / ("b" * 40) / subfolder / HISTORY_FILE
        history.rename(tmp_path / HISTORY_FILE)

        def cached_file(name, file, *, revision, cache_dir, subfolder, **kwargs):
            asked.append((name, file, revision, cache_dir, subfolder))
            return tmp_path / HISTORY_FILE

        monkeypatch.setattr(hf_quantizer, "cached_file", cached_file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    where = {"cache_dir": tmp_path / "cache", "revision": "v2", "subfolder": subfolder, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained("org/name", **where)
    assert config_of(loaded).mlp_ratio == 0.2
    assert torch.equal(logits(loaded, ids)[1], logits(models["b" * 40], ids)[1])
    expected = ("org/name", HISTORY_FILE, "b" * 40, tmp_path / "cache", subfolder)
    assert asked == ([] if beside else [expected])


def test_a_folder_named_like_the_hubs_without_its_history_is_refused(tmp_path):
    pruned().save_pretrained(tmp_path / "snapshots")
    (tmp_path / "snapshots" / HISTORY_FILE).unlink()
    with pytest.raises(StateError, match=f"has no {HISTORY_FILE}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "snapshots")


def test_the_model_is_left_as_it_was(tmp_path, ids):
    model = pruned()
    before = logits(model, ids)[0]
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(logits(model, ids)[0], before)
    assert not hasattr(model.config, "quantization_config")
    other = copy.deepcopy(model)
    pp_fx.calibrate(other, ids, progress=False)
    other.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), ids)[1], logits(other, ids)[1])
    assert not torch.equal(logits(other, ids)[1], logits(model, ids)[1]), "a copy saves its own history"
    pp_fx.restore(model).save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c" / HISTORY_FILE).exists()
    assert not pp_fx.is_transformed(AutoModelForCausalLM.from_pretrained(tmp_path / "c"))


def test_a_dense_checkpoint_loads_into_a_transformed_model(ids):
    model, other = pruned(), tiny_llama(seed=3)
    assert set(model.state_dict()) == set(other.state_dict())
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model, ids)[0], logits(_with_history_of(model, other), ids)[0])


def _with_history_of(model, other):
    pp_fx.transform(other, CONFIG_HERE)
    for here, there in zip(other.model.layers, model.model.layers, strict=True):
        for kind, state in here.states().items():
            for key, buffer in there.states()[kind]._buffers.items():
                if buffer is not None and key != "column":
                    state._buffers[key] = buffer.clone()
            state.calibrated = there.states()[kind].calibrated
    return other


def edited(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [{"mlp_ratio": 1e300}, {"mlp_ratio": -1}, {"round_to": 0}, {"unknown": 1}, {"version": 99}, {"score": "none"},
     {"probe": []}, {"history_file": "yes"}],
)  # fmt: skip
def test_hostile_configurations_are_refused(folder, changes):
    edited(folder, **changes)
    with pytest.raises(ConfigError):
        AutoModelForCausalLM.from_pretrained(folder)


def test_damaged_histories_are_refused(folder, tmp_path):
    path, model = folder / HISTORY_FILE, pruned()
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:
        good = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    before = {name: s.energy.clone() for name, s in model.named_modules() if getattr(s, "energy", None) is not None}

    def refused(match):
        with pytest.raises(StateError, match=match):
            read_history(model, path)
        after = {name: s.energy for name, s in model.named_modules() if getattr(s, "energy", None) is not None}
        assert all(torch.equal(after[name], before[name]) for name in before)

    path.write_bytes(whole[: len(whole) // 2])
    refused("cannot be read")
    path.write_bytes(b"\xff" * 64)
    refused("cannot be read")
    name = "1.mlp.energy"
    for wrong, match in (
        ({**good, name: good[name][:3].clone()}, r"1\.mlp\.energy is .* \(3,\), the model's is"),
        ({**good, name: good[name].half()}, r"1\.mlp\.energy is torch.float16"),
        ({**good, name: good[name] * torch.inf}, "not finite"),
        ({k: v for k, v in good.items() if k != name}, "does not fit the model's configuration"),
    ):
        save_file(wrong, path)
        refused(match)
    path.unlink()
    with pytest.raises(StateError, match=f"has no {HISTORY_FILE}"):
        AutoModelForCausalLM.from_pretrained(folder)
    edited(folder, history_file=False)
    assert not AutoModelForCausalLM.from_pretrained(folder).model.layers[1].pp_mlp.calibrated


def test_what_cannot_be_saved_is_refused_by_name(tmp_path):
    model = pruned()
    with pytest.raises(InputError, match="push_to_hub=True would leave the history behind"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ConfigError, match="config and mlp_ratio exclude each other"):
        pp_fx.ProbePruningHfConfig(CONFIG_HERE, mlp_ratio=0.2)


def test_a_failed_save_leaves_no_configuration_behind(tmp_path, monkeypatch):
    model = pruned()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        "pp_fx.integrations.saving.write_history", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "saved")
    assert not hasattr(model.config, "quantization_config")


def test_push_to_hub_sends_the_whole_folder(monkeypatch):
    """transformers' own method, up to the upload."""
    sent = {}

    class Hub:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

    def upload(self, working_dir, repo_id, *_, **__):
        from pathlib import Path

        sent[repo_id] = {p.name for p in Path(working_dir).iterdir()}

    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *_, **__: Hub(), raising=False)
    monkeypatch.setattr("transformers.utils.hub.create_repo", Hub().create_repo, raising=False)
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    pruned().push_to_hub("someone/pruned")
    assert {HISTORY_FILE, "config.json", "model.safetensors"} <= sent["someone/pruned"]


def test_the_commands_read_a_saved_folder(saved_folder, tmp_path):
    """`export` takes its pruning as it is; the others try configurations of their own on the dense model."""
    text = tmp_path / "text.txt"
    text.write_text("word " * 2000)
    options = ["--text", str(text), "--length", "32", "--sequences", "2", "--dtype", "float32", "--mlp-ratio", "0.2"]
    done = run("eval", str(saved_folder), *options)
    assert done.exit_code == 0, done.output
    assert "left aside" in done.output
    refused = run("export", str(saved_folder), str(tmp_path / "out"), "--mlp-ratio", "0.2")
    assert isinstance(refused.exception, InputError)
    assert "saved with its own pruning" in str(refused.exception)


def test_settings_in_a_file_of_their_own(tmp_path, ids):
    """config.json is the dense model's then: tools that refuse an unknown quant_method load the folder."""
    model = pruned()
    model.save_pretrained(tmp_path, quantization_config=False)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not pp_fx.is_transformed(dense)
    settings = pp_fx.ProbePruningHfConfig.from_pretrained(tmp_path)
    assert settings.config == CONFIG_HERE
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    for a, b in zip(logits(again, ids), logits(model, ids), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    pp_fx.restore(again)
    with torch.no_grad():
        again.model.embed_tokens.weight[0] += 1
    again.save_pretrained(tmp_path)  # dense and other weights, over a pruned model
    with pytest.raises(ConfigError, match="belongs to other weights"):
        pp_fx.ProbePruningHfConfig.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # the other way, into the same folder: nothing is left of this one
    with pytest.raises(InputError, match=r"has no pp_fx_config\.json"):
        pp_fx.ProbePruningHfConfig.from_pretrained(tmp_path)
    (tmp_path / "pp_fx_config.json").write_text('{"mlp_ratio": 2}')
    with pytest.raises(ConfigError, match="mlp_ratio=2"):
        pp_fx.ProbePruningHfConfig.from_pretrained(tmp_path)
    (tmp_path / "pp_fx_config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        pp_fx.ProbePruningHfConfig.from_pretrained(tmp_path)
