"""Whether two checkouts compute the same, bit for bit: perplexity, kept units, generated tokens, the ONNX folder.

    python reliability/unchanged.py OLD NEW

For changes that move code and must change nothing. Each checkout runs in its own `.venv`, on the embedded model, with
one thread (`make .venv/.ready` makes the environment).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def fingerprint(folder: Path) -> dict[str, str]:
    """What the pp_fx of a checkout computes; names of both checkouts alone are used."""
    import torch
    from transformers import DynamicCache

    import pp_fx
    from pp_fx.evaluate import evaluate
    from pp_fx.models import load
    from pp_fx.text import PYTHON_DOCS, read, sequences

    if not Path(pp_fx.__file__).is_relative_to(folder):
        sys.exit(f"the .venv of {folder} runs {pp_fx.__file__}: make it anew there")
    model, tokenizer = load("smollm2", torch.bfloat16)
    ids = sequences(read(PYTHON_DOCS), tokenizer, 16, 256)
    found = {"dense nll": evaluate(model, ids[8:], 8).nll.hex()}
    configs = {
        "default": pp_fx.ProbePruningConfig(),
        "heads": pp_fx.ProbePruningConfig(0.4, 0.37, compensation_min_tokens=512),
        "paper": pp_fx.ProbePruningConfig.paper(0.4),
        "re-probing": pp_fx.ProbePruningConfig(decode="probe", reprobe_every=4),
        "sticky": pp_fx.ProbePruningConfig(0.4, skip_layers=3, decode="sticky"),
        "flap": pp_fx.methods.METHODS["flap"].config(0.4),
    }
    for name, config in configs.items():
        pp_fx.transform(model, config)
        nodes = [node for i in (0, 29) for node in model.model.layers[i].graph.nodes]
        found[f"{name} graph"] = _digest([_described(node) for node in nodes])
        pp_fx.calibrate(model, ids[:8], progress=False)
        found[f"{name} nll"] = evaluate(model, ids[8:], 8).nll.hex()
        cache: Any = DynamicCache(config=model.config)
        tokens = model.generate(ids[8:10], past_key_values=cache, max_new_tokens=12, do_sample=False)
        found[f"{name} tokens"] = _digest(tokens.tolist())
        layers = cache.pp_fx_selections.layers
        kept = {f"{i}.{kind}": s.kept.tolist() for i, groups in layers.items() for kind, s in groups.items()}
        found[f"{name} kept"] = _digest(kept)
        buffers = [b.reshape(-1) for layer in model.model.layers for _, b in sorted(layer.named_buffers())]
        found[f"{name} history"] = _digest([b.view(torch.uint8).tolist() for b in buffers])
        pp_fx.restore(model)
    pp_fx.transform(model.float(), configs["heads"])
    pp_fx.calibrate(model, ids[:8], progress=False)
    with tempfile.TemporaryDirectory() as folder:
        pp_fx.export.onnx(model, Path(folder, "out"), tokenizer=tokenizer)
        for path in sorted(Path(folder, "out").iterdir()):
            found[f"onnx {path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _described(node: Any) -> list[str]:
    """What a node of a graph calls, by name, and on what: nodes and constants, whether they are named or not."""
    target = node.target if isinstance(node.target, str) else node.target.__name__
    given = [a for a in (*node.args, *node.kwargs.values()) if a is not None]  # a None may be left out
    return [node.op, node.name, target, *sorted(map(str, given))]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def of_checkout(folder: Path) -> dict[str, str]:
    """`fingerprint` by the Python of a checkout."""
    python = folder / ".venv" / "bin" / "python"
    # onnxscript names the loop variables of a function in the order of a set
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [str(python), str(Path(__file__).resolve()), "--fingerprint", str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", type=Path, nargs="+", help="two folders, each with its .venv")
    parser.add_argument("--fingerprint", action="store_true", help="print those of one; its Python runs this")
    options = parser.parse_args()
    options.checkouts = [folder.resolve() for folder in options.checkouts]
    if options.fingerprint:
        print(json.dumps(fingerprint(options.checkouts[0])))
        return
    if len(options.checkouts) != 2:
        parser.error("give two checkouts")
    old, new = map(of_checkout, options.checkouts)
    table, differ = Table("", "the same"), [name for name in {**old, **new} if old.get(name) != new.get(name)]
    for name in {**old, **new}:
        table.add_row(name, "NO" if name in differ else "yes")
    Console().print(table)
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
