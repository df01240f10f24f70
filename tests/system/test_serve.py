"""`pp-fx serve --engine transformers`: the command that it becomes, and a real server with a real client on loopback.

vLLM's side is in tests/vllm/test_serve.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from transformers.utils.import_utils import is_serve_available

import pp_fx
from pp_fx.cli import main

needs_server = pytest.mark.skipif(
    not is_serve_available(), reason="needs fastapi, uvicorn and openai: pip install '.[serve]'"
)
PROMPT = ("pruned as it runs; " * 7)[:120]


@pytest.fixture
def started(monkeypatch):
    """The command that would have taken this process's place."""
    found = []
    monkeypatch.setattr(os, "execv", lambda _, command: found.extend(command))

    def run(*arguments):
        with pytest.raises(SystemExit):
            main(["serve", *arguments])
        return found

    return run


@pytest.fixture(scope="module")
def saved_folder(dense_folder, tmp_path_factory):
    """Saved with a pruning that learns from prompts, and without a history."""
    path = str(tmp_path_factory.mktemp("saved"))
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1)).save_pretrained(path)
    AutoTokenizer.from_pretrained(dense_folder).save_pretrained(path)
    return path


@needs_server
def test_a_dense_folder_gets_the_settings(started, dense_folder):
    command = started(
        dense_folder, "--engine", "transformers", "--mlp-ratio", "0.1", "--skip-layers", "1", "--port", "9"
    )
    assert command[1:3] == ["-m", "pp_fx.cli.transformers_server"]
    settings = json.loads(command[3])
    assert (settings["mlp_ratio"], settings["skip_layers"], settings["min_select_tokens"]) == (0.1, 1, 256)
    assert (settings["decode"], settings["decode_ratio"]) == ("auto", None)
    assert command[4:6] == ["serve", dense_folder]
    assert {"--continuous-batching", "--no-cb-use-cuda-graph"} <= {*command}
    assert command[-2:] == ["--port", "9"]


@needs_server
def test_how_it_decodes(started, dense_folder):
    options = ("--skip-layers", "1", "--decode", "step", "--decode-ratio", "0.3")
    settings = json.loads(started(dense_folder, "--engine", "transformers", *options)[3])
    assert (settings["decode"], settings["decode_ratio"]) == ("step", 0.3)


@needs_server
def test_a_saved_folder_keeps_its_own(started, saved_folder, capsys):
    assert started(saved_folder, "--engine", "transformers")[3] == ""
    started(saved_folder, "--engine", "transformers", "--mlp-ratio", "0.1")
    assert "is saved with its own pruning" in capsys.readouterr().err


@needs_server
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_ratio": 0.2}, "continuous batching prunes channels of MLPs alone"),
        ({"decode": "sticky"}, "set one of 'auto', 'dense', 'step'"),
        ({"freeze_history": True}, "selects by the history alone"),
    ],
)
def test_what_cannot_be_served_is_said_before_the_start(started, dense_folder, tmp_path, capsys, changes, message):
    file = tmp_path / "config.json"
    file.write_text(pp_fx.ProbePruningConfig(skip_layers=1, **changes).to_json())
    assert started(dense_folder, "--engine", "transformers", "--config", str(file)) == []
    assert message in capsys.readouterr().err


def test_an_engine_that_is_not_there(started, dense_folder, capsys, monkeypatch):
    started(dense_folder, "--engine", "tgi")
    assert "vllm, transformers" in capsys.readouterr().err.replace("'", "")
    monkeypatch.setattr("pp_fx.cli.serve.is_serve_available", lambda: False)
    started(dense_folder, "--engine", "transformers")
    assert "pip install 'transformers[serving]'" in capsys.readouterr().err


def ask(port, **body):
    """A completion's answer, as text."""
    sent = json.dumps({"temperature": 0, **body}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", sent, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def completion(folder, prune):
    """What a model of this process makes of the prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if prune:
        pp_fx.transform(model, pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, min_select_tokens=64))
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)
    found = model.generate_batch([tokenizer(PROMPT)["input_ids"]], settings, small)
    return tokenizer.decode(next(iter(found.values())).generated_tokens)


@needs_server
@pytest.mark.slow
def test_a_server_answers_and_ends(dense_folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = tmp_path / "config.json"
    file.write_text(pp_fx.ProbePruningConfig(mlp_ratio=0.4, skip_layers=1, min_select_tokens=64).to_json())
    options = ["--engine", "transformers", "--config", str(file), "--port", str(port), "--host", "127.0.0.1"]
    options += ["--cb-num-blocks", "16", "--cb-max-batch-tokens", "256", "--device", "cpu"]
    server = subprocess.Popen([sys.executable, "-m", "pp_fx.cli", "serve", dense_folder, *options])
    try:
        for _ in range(180):
            assert server.poll() is None
            try:
                found = json.loads(ask(port, model=dense_folder, prompt=PROMPT, max_tokens=8))
                break
            except urllib.error.HTTPError as error:
                pytest.fail(error.read().decode())
            except (ConnectionError, urllib.error.URLError):
                time.sleep(1)
        assert found["usage"] == {**found["usage"], "prompt_tokens": 120, "completion_tokens": 8}
        pruned = completion(dense_folder, prune=True)
        assert found["choices"][0]["text"] == pruned != completion(dense_folder, prune=False)
        lines = ask(port, model=dense_folder, prompt="in spring", max_tokens=3, stream=True).split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.strip() not in ("", "data: [DONE]")]
        assert len(events) > 1
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        server.send_signal(signal.SIGINT)
        assert server.wait(30) is not None
    finally:
        server.kill()
