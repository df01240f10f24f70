"""What cannot be served ends while the model loads, with a sentence that names it."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

pytest.importorskip("vllm", reason="needs vLLM; `make vllm` makes an environment with it")

from vllm.config import CUDAGraphMode

from pp_fx.errors import ConfigError, RequirementError
from pp_fx.integrations.vllm import refusals
from pp_fx.integrations.vllm.method import PpFxConfig
from pp_fx.integrations.vllm.plugin import register

from .conftest import SETTINGS, calibrated, engine


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_ratio": 1.5}, "mlp_ratio=1.5 is out of range"),
        ({"attention_ratio": 0.2}, "attention_ratio=0.2: vLLM prunes channels"),
        ({"decode": "sticky"}, "decode='sticky'"),
        ({"decode_ratio": 0.3}, "decode_ratio=0.3: with decode='auto' decoding runs dense in vLLM"),
        ({"history": "position"}, "history='position'"),
        ({"guard": True}, "guard=True"),
        ({"probe": {"ranking": "residual"}}, "probe.ranking='residual'"),
        ({"probe": {"sample_fraction": 0.5}}, "probe.sample_fraction=0.5"),
        ({"probe": {"first_position": "always"}}, "probe.first_position='always'"),
        ({"ratio": 0.2}, "unknown keys ratio"),
    ],
)
def test_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        PpFxConfig.from_config({"quant_method": "pp_fx", **fields})


def test_another_version(monkeypatch):
    monkeypatch.setattr(refusals.vllm, "__version__", "0.33.0")
    with pytest.raises(RequirementError, match=r"vllm 0\.33\.0 is not supported"):
        PpFxConfig()


def test_registering_twice():
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    register()
    assert get_quantization_config("pp_fx") is PpFxConfig


def refused(folder, message, **options):
    with pytest.raises(Exception, match=message), engine(str(folder), **options):
        pass


def test_an_mlp_without_a_gate(tmp_path):
    config = OPTConfig(
        vocab_size=199, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, ffn_dim=192,
        max_position_embeddings=256, word_embed_proj_dim=128,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)
    refused(tmp_path, "the MLP is not gated", pruning={"mlp_ratio": 0.2, "skip_layers": 1})


def test_the_history_of_another_model(pruned_folder, tmp_path):
    shutil.copytree(pruned_folder, tmp_path, dirs_exist_ok=True)
    calibrated(dataclasses.replace(SETTINGS, skip_layers=2, mlp_ratio=0.2)).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "pp_fx_history.safetensors", tmp_path)
    refused(tmp_path, "does not fit the model")


def test_a_missing_history(pruned_folder, tmp_path):
    shutil.copytree(pruned_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "pp_fx_history.safetensors").unlink()
    refused(tmp_path, "has no pp_fx_history")


def test_the_history_alone_without_one(dense_folder):
    refused(dense_folder, "select by the history alone", pruning={"freeze_history": True})


def test_too_many_ratios(dense_folder):
    refused(dense_folder, "names 2 layers, the model has 3", pruning={"mlp_ratio": [0.2, 0.2]})


def test_lora(pruned_folder):
    refused(pruned_folder, "enable_lora does not go together", enable_lora=True)


def test_speculative_decoding(pruned_folder):
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    refused(pruned_folder, "speculative_config does not go together", speculative_config=ngram)


def test_a_shard_of_a_history(pruned_folder):
    """Every rank reads its own channels."""
    from pp_fx.calibration.history_file import load_states
    from pp_fx.errors import StateError
    from pp_fx.runtime.state import GroupState, states_of

    whole = [s for s in states_of(calibrated()) if s.prunes]
    for rank in range(2):
        states = {
            f"{i + 1}.mlp": GroupState("mlp", 96, 1, 64, SETTINGS, torch.ones(128, 96), lambda *a: None)
            for i in range(2)
        }
        load_states(states, f"{pruned_folder}/pp_fx_history.safetensors", (rank, 2))
        for state, full in zip(states.values(), whole, strict=True):
            assert state.calibrated
            assert torch.equal(state.energy, full.energy[rank * 96 : (rank + 1) * 96])
            assert torch.equal(state.directions, full.directions[:, rank * 96 : (rank + 1) * 96])
    with pytest.raises(StateError, match="the model's is"):
        load_states(states, f"{pruned_folder}/pp_fx_history.safetensors", (0, 5))


def test_recorded_steps_would_not_roll():
    """As on a GPU, where vLLM records whole decode steps unless it is told otherwise."""
    parallel = SimpleNamespace(pipeline_parallel_size=1, enable_dbo=False, enable_expert_parallel=False)

    def check(decode, mode):
        engine = SimpleNamespace(
            lora_config=None, speculative_config=None, parallel_config=parallel,
            model_config=SimpleNamespace(is_multimodal_model=False),
            compilation_config=SimpleNamespace(cudagraph_mode=mode),
        )  # fmt: skip
        refusals.check_engine(engine, dataclasses.replace(SETTINGS, decode=decode))

    with pytest.raises(ConfigError, match=r"whose steps decide, does not go together.*set it to PIECEWISE"):
        check("rolling", CUDAGraphMode.FULL_AND_PIECEWISE)
    check("rolling", CUDAGraphMode.PIECEWISE)
    check("rolling", None)
    check("step", CUDAGraphMode.FULL_AND_PIECEWISE)
