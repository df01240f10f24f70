"""`pp-fx serve`: what it starts, and a real server with a real client on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM; `make vllm` makes an environment with it")

from pp_fx.cli import main


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


def test_a_dense_folder_gets_the_settings(started, dense_folder):
    command = started(dense_folder, "--mlp-ratio", "0.1", "--skip-layers", "1", "--port", "9")
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", dense_folder]
    found = json.loads(command[command.index("--hf-overrides") + 1])["quantization_config"]
    assert found["min_select_tokens"] == 256
    assert (found["quant_method"], found["mlp_ratio"], found["skip_layers"]) == ("pp_fx", 0.1, 1)
    assert command[-2:] == ["--port", "9"]


def test_what_quantized_the_weights_stays_known(started, dense_folder, tmp_path):
    config = json.loads(Path(dense_folder, "config.json").read_text())
    own = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    command = started(str(tmp_path), "--mlp-ratio", "0.1", "--skip-layers", "1")
    found = json.loads(command[command.index("--hf-overrides") + 1])["quantization_config"]
    assert (found["quant_method"], found["mlp_ratio"], found["quantization"]) == ("pp_fx", 0.1, own)
    assert found["min_select_tokens"] == 1024


def test_a_saved_folder_keeps_its_own(started, pruned_folder, capsys):
    assert "--hf-overrides" not in started(pruned_folder)
    started(pruned_folder, "--mlp-ratio", "0.1")
    assert "is saved with its own pruning" in capsys.readouterr().err


def test_a_server_answers(pruned_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "256", "--served-model-name", "tiny"]
    server = subprocess.Popen([sys.executable, "-m", "pp_fx.cli", "serve", pruned_folder, *options])
    body = {"model": "tiny", "prompt": "in spring the trees are green " * 4, "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        for _ in range(180):
            assert server.poll() is None
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    found = json.load(answer)
                break
            except (ConnectionError, urllib.error.URLError):
                time.sleep(1)
        assert found["usage"] == {**found["usage"], "prompt_tokens": 120, "completion_tokens": 4}
        server.send_signal(signal.SIGINT)
        assert server.wait(60) is not None
    finally:
        server.kill()
