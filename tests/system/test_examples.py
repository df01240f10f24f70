"""The runners of examples/ on a tiny model with a real tokenizer: each gives `OrtModel`'s tokens."""

import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pp_fx
from pp_fx.export import OrtModel

EXAMPLES = Path(__file__).parents[2] / "examples"
JAVASCRIPT = EXAMPLES / "javascript"
TEXT = "Probe pruning looks ahead with a tiny probe and decides which channels this prompt needs. " * 4
COUNT = 12

needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (JAVASCRIPT / "node_modules" / "onnxruntime-node").is_dir(),
    reason="needs node, and the packages that `make test` installs in examples/javascript",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def tokenizer():
    """Byte-level BPE of 300 pieces."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model, its weights large enough that a wrong selection changes the text."""
    torch.manual_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    pp_fx.transform(model, pp_fx.ProbePruningConfig(0.4, skip_layers=1, round_to=1, decode="sticky"))
    return pp_fx.export.onnx(model, tmp_path_factory.mktemp("examples") / "model", tokenizer=words)


@pytest.fixture(scope="module")
def prompt(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def expected(folder, prompt):
    """The new tokens, pruned; dense decoding gives others."""
    model = OrtModel.from_pretrained(folder, ops_library=None)
    pruned, stock = (
        OrtModel.generate(m, prompt, max_new_tokens=COUNT, do_sample=False) for m in (model, dense(folder))
    )
    assert not torch.equal(pruned, stock), "the model must tell a pruned decoding from a dense one"
    return pruned[0, prompt.shape[1] :].tolist()


def dense(folder):
    """Decodes with the whole weights, as tools do that know nothing of selections."""
    model = OrtModel.from_pretrained(folder, ops_library=None)
    model.reuses = False
    return model


def run(*command, cwd=None, env=None):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler and dlopen")
@pytest.mark.parametrize("native", [False, True])
def test_c(folder, prompt, expected, tmp_path, monkeypatch, native):
    program = tmp_path / "generate"
    run("cc", "-O2", "-Wall", "-Werror", EXAMPLES / "c" / "generate.c", "-o", program, "-ldl")
    runtime = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    monkeypatch.setenv("PP_FX_CACHE", str(tmp_path))
    options = ["--ops", pp_fx.export.build_ort_ops()] if native else []
    made = run(program, runtime, folder / "model.onnx", COUNT, *options, *prompt[0].tolist())
    assert list(map(int, made.split())) == expected


def test_prune(folder, tmp_path):
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, num_hidden_layers=5))
    model.save_pretrained(tmp_path / "dense")
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "dense")
    made = run(sys.executable, EXAMPLES / "prune.py", tmp_path / "dense", tmp_path / "out", "--ratio", "0.3")
    assert "The quick brown fox" in made
    assert (tmp_path / "out" / "pp_fx_history.safetensors").is_file()


@needs_node
def test_node(folder, prompt, expected):
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    made = run("node", "node.mjs", folder, TEXT, COUNT, cwd=JAVASCRIPT)
    assert made.strip() == words.decode(prompt[0].tolist() + expected, skip_special_tokens=True).strip()


@needs_node
def test_stock_transformers_js_decodes_dense(folder, prompt):
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    stock = dense(folder).generate(prompt, max_new_tokens=COUNT, do_sample=False)
    made = run("node", "stock.mjs", folder, TEXT, COUNT, cwd=JAVASCRIPT)
    assert made.strip() == words.decode(stock[0].tolist(), skip_special_tokens=True).strip()


@needs_node
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_web_page(folder, expected, tmp_path):
    """In a real headless browser; the page and the model from one local server."""
    (tmp_path / "site").mkdir()
    for source in (*JAVASCRIPT.glob("*.*"), JAVASCRIPT / "node_modules"):
        (tmp_path / "site" / source.name).symlink_to(source)
    (tmp_path / "site" / "model").symlink_to(folder)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = f"http://127.0.0.1:{server.server_port}/index.html?model=model&tokens={COUNT}"
        env = {**os.environ, "CHROMIUM": CHROMIUM, "PP_FX_PROMPT": TEXT, "PP_FX_SHOT": str(tmp_path / "page.png")}
        made = json.loads(run("node", "drive.mjs", page, cwd=JAVASCRIPT, env=env))
    finally:
        server.shutdown()
    assert list(map(int, made["tokens"].split())) == expected
    assert made["errors"] == []


@pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="needs onnxruntime-genai")
def test_onnxruntime_genai(folder, prompt):
    """Another stock tool: right text, decoded dense."""
    stock = dense(folder).generate(prompt, max_new_tokens=COUNT, do_sample=False)[0, prompt.shape[1] :].tolist()
    made = run(sys.executable, EXAMPLES / "genai.py", folder, TEXT, COUNT, "--ids")
    ended = len(stock) - (stock[-1] == PreTrainedTokenizerFast.from_pretrained(folder).eos_token_id)
    assert list(map(int, made.split())) == stock[:ended]
