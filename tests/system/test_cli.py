import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

import pp_fx
from pp_fx.cli import main
from pp_fx.errors import PpFxError
from tests.helpers.command import run
from tests.helpers.models import tiny_llama


def test_eval_writes_json_alone_to_stdout(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    result = run("eval", folder, "--text", str(text), "--sequences", "4", "--length", "64", "--batch", "2",
                 "--mlp-ratio", "0.3", "--attention-ratio", "0.2", "--json", "-")  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert set(data) == {"model", "config", "tokens", "dense", "pruned", "macs", "kept", "versions"}
    assert data["tokens"] == 256
    assert set(data["dense"]) == {"nll", "ppl", "seconds"}
    assert set(data["pruned"]) == {"nll", "ppl", "seconds", "nll_stderr_vs_dense"}
    assert data["macs"]["pruned"] < data["macs"]["dense"]
    assert data["macs"]["probe"] > 0
    assert data["kept"][0] == {"mlp": 96, "heads": 4}
    assert data["kept"][4] == {"mlp": 48, "heads": 3}
    assert data["pruned"]["nll"] != data["dense"]["nll"]


def test_compare_writes_json_and_plot(folder, tmp_path):
    plot, file = tmp_path / "plot.png", tmp_path / "result.json"
    text = ("compare", folder, "--text", "python-docs", "--calibration", "python-docs")
    result = run(*text, "--methods", "default,flap", "--ratios", "0.3", "--sequences", "2", "--length", "64",
                 "--time-batch", "0", "--plot", str(plot), "--json", str(file))  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [(r["method"], r["ratio"]) for r in rows] == [
        ("default", 0.3),
        ("flap", 0.3),
    ]
    assert plot.stat().st_size > 1000
    assert "'best' is unknown" in str(run(*text, "--methods", "best").exception)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "/no/such/file"], "text='/no/such/file' cannot be read"),
        (["--text", "python-docs", "--calibration", "/no/such/file"], "calibration='/no/such/file' cannot be read"),
        (["--text", "python-docs", "--config", "/no/such/file"], "config='/no/such/file' cannot be read"),
        (["--text", "python-docs", "--mlp-ratio", "1.5"], "mlp_ratio=1.5"),
        (["--text", "python-docs", "--dtype", "int4"], "dtype='int4'"),
        (["--text", "python-docs", "--preset", "best"], "preset='best'"),
        (["--text", "python-docs", "--mlp-ratio", "0.1", "--sequences", "1000000"], "sequences=1000000"),
        (["--text", "python-docs", "--mlp-ratio", "0.1", "--length", "0"], "length=0"),
        (["--text", "python-docs", "--mlp-ratio", "0.1", "--batch", "0", "--compile"], "batch=0"),
        (["--text", "python-docs", "--json", "/no/such/folder/out.json"], "json='/no/such/folder/out.json'"),
    ],
)
def test_bad_input_names_argument_and_value(folder, args, message):
    result = run("eval", folder, *args)
    assert isinstance(result.exception, PpFxError)
    assert message in str(result.exception)


def test_files_that_cannot_be_written_are_found_before_the_work(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for arguments, message in (
        (("compare", "/no/model", "--text", "python-docs", "--calibration", "python-docs"), "plot='/no/a.png'"),
        (("demo", "--json", str(tmp_path)), "json="),
    ):
        result = run(*arguments, *(("--plot", "/no/a.png") if "compare" in arguments else ()))
        assert isinstance(result.exception, PpFxError)
        assert message in str(result.exception)
    with pytest.raises(PpFxError, match="directory="):
        pp_fx.report(tiny_llama(), torch.ones(8, 9, dtype=torch.long), torch.ones(8, 9, dtype=torch.long), file)


def test_a_damaged_folder_is_one_line(folder, tmp_path):
    damaged = tmp_path / "damaged"
    for name, size in (("model.safetensors", 5000), ("tokenizer.json", 100)):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder, damaged)
        (damaged / name).write_bytes((damaged / name).read_bytes()[:size])
        result = run("eval", str(damaged), "--text", "python-docs", "--mlp-ratio", "0.1")
        assert isinstance(result.exception, PpFxError)
        assert f"model={str(damaged)!r} cannot be loaded" in str(result.exception)
        assert "\n" not in str(result.exception)


def test_version():
    assert run("--version").output == f"pp-fx {pp_fx.__version__}\n"


def test_explain_of_a_saved_model_uses_its_settings(tmp_path):
    model = pp_fx.transform(tiny_llama(layers=5), pp_fx.ProbePruningConfig(mlp_ratio=0.2, skip_layers=2, round_to=1))
    model.save_pretrained(tmp_path / "pruned")
    for options, kept in (((), 64), (("--mlp-ratio", "0.3"), 48)):  # round_to 1 and 16
        result = run("explain", str(tmp_path / "pruned"), *options, "--json", "-")
        assert result.exit_code == 0, result.output
        groups = json.loads(result.stdout)["layers"][4]["groups"]
        assert [g["kept"] for g in groups if g["kind"] == "mlp"] == [kept]


def test_calibration_takes_what_a_short_text_holds(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    options = ("--sequences", "1", "--length", "64", "--batch", "1", "--mlp-ratio", "0.3", "--json", "-")
    result = run("eval", folder, "--text", str(text), "--calibration", str(text), *options)
    assert result.exit_code == 0, result.output


def test_import_stays_lean():
    code = (
        "import sys, pp_fx; "
        "lean = ('onnx', 'onnxscript', 'onnx_ir', 'onnxruntime', 'matplotlib', 'datasets', 'typer'); "
        "bad = [m for m in lean if m in sys.modules]; "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_export_writes_a_folder_that_generates(folder, tmp_path):
    from pp_fx.export import OrtModel

    result = run("export", folder, str(tmp_path / "out"), "--calibration", "none", "--mlp-ratio", "0.3",
                 "--json", "-")  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["check"]["passed"]
    assert data["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("the quick", return_tensors="pt").input_ids
    assert OrtModel.from_pretrained(tmp_path / "out").generate(inputs, max_new_tokens=3).shape[1] <= inputs.shape[1] + 3
    assert not json.loads((tmp_path / "out" / "pp_fx.json").read_text())["calibrated"]
    again = run("export", folder, str(tmp_path / "out"), "--mlp-ratio", "0.3")
    assert isinstance(again.exception, PpFxError)
    assert "not empty" in str(again.exception)


def test_errors_are_one_line_and_debug_shows_the_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["explain", str(tmp_path / "missing")])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.startswith("pp-fx: ")
    assert error.count("\n") == 1
    command = [sys.executable, "-m", "pp_fx.cli", "--debug", "explain", str(tmp_path / "missing")]
    long = subprocess.run(command, capture_output=True, text=True)
    assert long.returncode == 1
    assert "Traceback" in long.stderr
    assert run("explain", "--wrong").exit_code == 2
    shown = run("--help").output
    assert all(name in shown for name in ("demo", "eval", "bench", "explain", "compare", "report", "export", "--debug"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "FOLDER", "--text", "nowhere.txt"], "--text='nowhere.txt' cannot be read"),
        (["eval", "FOLDER", "--text", "python-docs", "--mlp-ratio", "2"], "--mlp-ratio=2.0"),
        (["eval", "FOLDER", "--text", "python-docs", "--skip-layers", "5"], "--skip-layers=5 leaves nothing"),
        (["bench", "FOLDER", "--mlp-ratio", "0.9"], "lower --mlp-ratio or --skip-layers"),
        (["export", "FOLDER", "FULL"], "give another one or --overwrite"),
    ],
)
def test_errors_name_the_options_of_the_command(folder, tmp_path, capsys, arguments, message, monkeypatch):
    """And those of the configuration come before the weights are read."""
    monkeypatch.setattr("pp_fx.models.AutoModelForCausalLM", None)
    (tmp_path / "file").write_text("")
    names = {"FOLDER": folder, "FULL": str(tmp_path)}
    with pytest.raises(SystemExit):
        main([names.get(a, a) for a in arguments])
    assert message in capsys.readouterr().err


def test_skipped_layers_are_an_option(folder):
    result = run("explain", folder, "--mlp-ratio", "0.3", "--skip-layers", "1", "--json", "-")
    assert json.loads(result.stdout)["config"]["skip_layers"] == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    from pp_fx.text import read

    (tmp_path / "text.txt").write_text("words", encoding="utf-8-sig")
    assert read(str(tmp_path / "text.txt")) == "words"


def test_an_interrupt_while_importing_is_quiet():
    code = (
        "import sys; sys.modules['pp_fx'] = None\nclass Stop:\n def find_spec(self, *given): raise KeyboardInterrupt\n"
    )
    code += "sys.meta_path.insert(0, Stop()); del sys.modules['pp_fx']\nimport builtins\n"
    code = f"import pp_fx_command\n{code}pp_fx_command.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_values_of_an_error_stay_as_they_are(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "runs/mlp_ratio/length=512", "--text", "python-docs"])
    assert "model='runs/mlp_ratio/length=512' cannot be loaded" in capsys.readouterr().err


def test_a_configuration_of_something_else(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path), "--text", "python-docs"])
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("eval", "--text", "python-docs"), ("export", "out", "--calibration", "none")], ids=lambda a: a[0]
)
def test_a_static_preset_asks_for_calibration_before_anything_long(folder, arguments, monkeypatch):
    monkeypatch.setattr("pp_fx.models.AutoModelForCausalLM", None)
    command, *rest = arguments
    result = run(command, folder, *rest, "--preset", "wanda_sp", "--mlp-ratio", "0.2", "--skip-layers", "1")
    assert "calibration=" in str(result.exception)
    assert "give a text" in str(result.exception)
