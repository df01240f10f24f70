"""Weights that torchao or compressed-tensors have quantized, pruned: against transformers, vLLM itself and torch."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vllm", reason="needs vLLM; `make vllm` makes an environment with it")
pytest.importorskip("torchao", reason="needs torchao")

from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

import pp_fx
from pp_fx.errors import ConfigError
from pp_fx.integrations.packing import Numbers
from pp_fx.integrations.to_torchao import as_torchao
from pp_fx.integrations.vllm.method import PpFxConfig
from pp_fx.layouts import widened

from ..helpers import packed
from .conftest import IDS, SETTINGS, engine, expected, generate, logprobs, steps_of, tiny, tokens
from .test_mlp import C, H, act, call, even_rows, make, zeroed

STEP = dataclasses.replace(SETTINGS, decode="step", decode_ratio=0.5)


def rounded(dense_folder):
    """The tiny model in torchao's int8, a scale for each row."""
    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    return AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config).eval()


@pytest.fixture(scope="session")
def rounded_folder(dense_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("rounded")
    rounded(dense_folder).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory):
    """int8 weights and activations (W8A8) as compressed-tensors packs them."""
    path = tmp_path_factory.mktemp("packed")
    return packed.save(tiny(), packed.scheme("W8A8"), path)


def quantization(folder):
    return json.loads(Path(folder, "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    "settings", [SETTINGS, STEP, dataclasses.replace(STEP, step_probe="int8")], ids=["dense", "step", "step_probe"]
)
def test_a_saved_folder_is_served_as_transformers_runs_it(dense_folder, tmp_path, settings, apart, compiled):
    if compiled and (apart or settings.step_probe is not None):
        pytest.skip("what ranks and where the settings lie do not meet compilation")
    model = pp_fx.calibrate(pp_fx.transform(rounded(dense_folder), settings), IDS[:8].flip(1), progress=False)
    model.save_pretrained(tmp_path, quantization_config=not apart)
    wanted, made = expected(model, IDS[:4], 8)
    dense, _ = expected(pp_fx.restore(model), IDS[:4], 8)
    assert (wanted - dense).abs().mean() > 0.05
    options = {"quantization": "pp_fx"} if apart else {}
    with engine(str(tmp_path), enforce_eager=not compiled, **options) as llm:
        assert llm.llm_engine.vllm_config.quant_config.settings.mlp_ratio == settings.mlp_ratio
        outputs = [generate(llm, IDS[i : i + 1], prompt_logprobs=0)[0] for i in range(4)]
        assert steps_of(llm).pruned == 4
    torch.testing.assert_close(logprobs(outputs), wanted, atol=2e-3, rtol=0)
    assert tokens(outputs) == made


def test_frozen_requests_do_not_depend_on_their_company(dense_folder, tmp_path):
    settings = dataclasses.replace(SETTINGS, freeze_history=True)
    model = pp_fx.calibrate(pp_fx.transform(rounded(dense_folder), settings), IDS[:8].flip(1), progress=False)
    model.save_pretrained(tmp_path)
    rows = [row[:n] for row, n in zip(IDS.tolist(), (4, 20, 40, 90), strict=False)]
    with engine(str(tmp_path)) as llm:
        alone = [tokens(generate(llm, [row]))[0] for row in rows]
        assert tokens(generate(llm, rows)) == alone


@pytest.mark.parametrize("kind", ["rounded_folder", "packed_folder"])
def test_ratio_zero_is_vllm(request, kind):
    folder = request.getfixturevalue(kind)
    with engine(folder) as llm:
        dense = tokens(generate(llm, IDS[:16]))
    pruning = {"mlp_ratio": 0.0, "quantization": quantization(folder)}
    with engine(folder, pruning=pruning) as llm:
        assert tokens(generate(llm, IDS[:16])) == dense


def test_packed_by_compressed_tensors(packed_folder):
    """vLLM rounds activations in its own way, so numbers are near transformers' and not equal."""
    model = pp_fx.to_torchao(AutoModelForCausalLM.from_pretrained(packed_folder).eval())
    dense, _ = expected(model, IDS[:4], 1)
    wanted, _ = expected(pp_fx.transform(model, SETTINGS), IDS[:4], 1)
    with engine(packed_folder, quantization="pp_fx") as llm:  # the default settings, by the name alone
        assert llm.llm_engine.vllm_config.quant_config.settings.mlp_ratio == pp_fx.ProbePruningConfig().mlp_ratio
    pruning = {"quantization": quantization(packed_folder), **SETTINGS.to_dict()}
    with engine(packed_folder, pruning=pruning) as llm:
        found = logprobs([generate(llm, IDS[i : i + 1], 1, prompt_logprobs=0)[0] for i in range(4)])
        assert steps_of(llm).pruned == 4
    assert (found - wanted).abs().mean() < (wanted - dense).abs().mean() / 3


@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_one_mlp_beside_its_rounded_weights(rounds_inputs):
    settings = dataclasses.replace(SETTINGS, history=None, mlp_compensation=None)
    draw = torch.Generator().manual_seed(0)
    parts = []
    for shape in ((2 * C, H), (H, C)):
        scales = torch.rand(shape[0], 1, generator=draw) / 64
        codes = torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)
        parts.append(as_torchao(Numbers(codes, scales, None, 8, rounds_inputs), torch.float32))
    inputs, output = (widened(part) for part in parts)
    mlp, steps, _ = make(settings, weights=parts)
    steps.starts = [0, 40]
    x = torch.randn(40, H, generator=draw)
    found = call(mlp, x, None, None)
    energy = act(F.linear(even_rows(x), inputs)).pow(2).mean(0)
    kept = (energy * output.pow(2).norm(dim=0)).topk(mlp.state.kept_units).indices
    wanted = zeroed(x, (inputs, None, output, None), kept)
    close = 0.03 if rounds_inputs else 1e-5
    assert (found - wanted).norm() < close * wanted.norm()


def test_methods_that_are_refused(packed_folder):
    cache = quantization(packed_folder) | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    bits = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    for fields, message in ((bits, "quantization='bitsandbytes': vLLM prunes"), (cache, "kv_cache_scheme")):
        with pytest.raises(ConfigError, match=message):
            PpFxConfig.from_config({"quant_method": "pp_fx", "quantization": fields})
        with pytest.raises(ConfigError, match=message):
            PpFxConfig.from_config(fields)


def test_weights_in_groups_are_refused(tmp_path):
    folder = packed.save(tiny(), packed.scheme("W4A16"), tmp_path)
    with pytest.raises(Exception, match="is packed by compressed-tensors as"), engine(folder, quantization="pp_fx"):
        pass
