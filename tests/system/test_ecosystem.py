"""A transformed model in the tools around transformers: each works as with the dense model, or is refused by name."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, Trainer, TrainingArguments, pipeline
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import pp_fx
from pp_fx.errors import StateError, UnsupportedModelError
from tests.helpers.models import tiny_llama
from tests.system.test_examples import tokenizer

CONFIG = pp_fx.ProbePruningConfig(mlp_ratio=0.4, attention_ratio=0.4, skip_layers=1, round_to=1)


@pytest.fixture
def model(ids):
    made = pp_fx.transform(tiny_llama(vocab_size=300), CONFIG)
    pp_fx.calibrate(made, ids, progress=False)
    return made


def test_pipeline_generates_what_generate_does(model):
    words = tokenizer()
    model = pp_fx.transform(pp_fx.restore(model), dataclasses.replace(CONFIG, freeze_history=True))
    text = "Probe pruning looks ahead with a tiny probe. " * 3
    made = pipeline("text-generation", model=model, tokenizer=words)(
        text, max_new_tokens=6, do_sample=False, return_full_text=True
    )
    inputs = words(text, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    assert made[0]["generated_text"] == words.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_contexts(model, ids, mode):
    with pp_fx.history_frozen(model):
        with torch.no_grad():
            expected = model(ids).logits
        with mode(), torch.no_grad():
            found = model(ids).logits
    torch.testing.assert_close(found.float(), expected, atol=0.3, rtol=0.1)


def test_trainer_evaluates(model, ids, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True)
    with pp_fx.history_frozen(model):
        found = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
        with torch.no_grad():
            expected = float(model(ids, labels=ids).loss)
    assert math.isclose(found, expected, rel_tol=1e-5)


def test_a_device_map_over_one_device_works_and_offloading_is_refused_by_name(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    tiny_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert pp_fx.is_transformed(pp_fx.transform(model, CONFIG))
    offloaded = accelerate.cpu_offload(tiny_llama(), "cpu")
    with pytest.raises(UnsupportedModelError, match="is on the meta device; load the weights before transform"):
        pp_fx.transform(offloaded, CONFIG)


def test_a_device_map_over_several_devices_is_refused_by_name():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llama()
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    accelerate.dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)  # those that several devices get
    with pytest.raises(UnsupportedModelError, match="a device_map over several devices"):
        pp_fx.transform(model, CONFIG)
    assert not pp_fx.is_transformed(model)


def test_weight_only_int8_of_what_is_not_pruned(ids):
    """torchao quantizes the LM head of a model that is pruned; the layers before: tests/behaviour/test_quantized.py."""
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = pp_fx.transform(tiny_llama(), CONFIG)
    with torch.no_grad(), pp_fx.history_frozen(model):
        expected = model(ids).logits
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda module, name: name == "lm_head")
        found = model(ids).logits
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.02


def local_task(folder, text):
    """A task of lm-eval that needs no network."""
    (folder / "text.jsonl").write_text(json.dumps({"page": text}) + "\n")
    (folder / "local_text.yaml").write_text(
        "task: local_text\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / 'text.jsonl'}\noutput_type: loglikelihood_rolling\ntest_split: test\n"
        "doc_to_text: ''\ndoc_to_target: '{{page}}'\nmetric_list:\n  - metric: word_perplexity\n"
    )


def test_lm_evals_command_line(tmp_path):
    """It does not import pp_fx, so it refuses a folder with the pruning in config.json; `pp-fx lm-eval` prunes."""
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    model = pp_fx.transform(tiny_llama(vocab_size=300, eos_token_id=0), CONFIG)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    local_task(tmp_path, "Probe pruning looks ahead with a tiny probe. " * 3)
    arguments = [
        "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'},dtype=float32", "--tasks", "local_text",
        "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "1",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pp_fx.cli", "lm-eval", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"local_text.*word_perplexity", done.stdout), done.stdout


def test_lm_eval_gives_the_models_own_loss(tmp_path):
    """HFLM on a local task file: rolling log-likelihood of a text, against the model's own loss on the same tokens."""
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    pytest.importorskip("datasets", reason="needs datasets")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    words = tokenizer()
    model = pp_fx.transform(tiny_llama(vocab_size=300, eos_token_id=0), CONFIG)
    text = "Probe pruning looks ahead with a tiny probe and decides which channels this prompt needs. " * 2
    local_task(tmp_path, text)
    with pp_fx.history_frozen(model):
        judge = HFLM(pretrained=model, tokenizer=words, max_length=200, batch_size=1)
        found = simple_evaluate(
            judge, tasks=["local_text"], task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=0
        )
        ids = words(text, return_tensors="pt").input_ids
        ids = torch.cat([torch.tensor([[words.eos_token_id]]), ids], 1)  # lm-eval starts with the end token
        with torch.no_grad():  # the model sees all tokens but the last, which is only predicted
            logits = model(ids[:, :-1]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    measured = math.log(found["results"]["local_text"]["word_perplexity,none"])
    measured *= len(re.split(r"\s+", text)) / (ids.shape[1] - 1)  # lm-eval divides by its count of words
    assert abs(measured - expected) < 1e-3


def test_offloading_after_transform_is_refused_by_name(model, ids):
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(StateError, match="accelerate offload"):
        accelerate.cpu_offload(model, "cpu")(ids)


def test_torch_jit_trace_is_refused_by_name(model, ids):
    with torch.no_grad(), pytest.raises(StateError, match=r"torch\.jit\.trace would record one prompt's selection"):
        torch.jit.trace(lambda given: model(given, use_cache=False).logits, ids)


def test_an_attention_function_that_reads_projections(ids):
    """A registered function sees the kept heads alone; what it asks of the module beyond them is named."""

    def reading(module, *given, **kwargs):
        assert getattr(module, "no_such_thing", None) is None
        assert module.q_proj is not None
        return sdpa_attention_forward(module, *given, **kwargs)

    AttentionInterface.register("reads_projections", reading)
    model = tiny_llama()
    model.set_attn_implementation("reads_projections")
    with torch.no_grad():
        dense = model(ids).logits
        pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.0, skip_layers=0))
        assert torch.equal(model(ids).logits, dense)
        pp_fx.restore(model)
        pp_fx.transform(model, CONFIG)
        with pytest.raises(StateError, match="the attention function reads q_proj of its module"):
            model(ids)
