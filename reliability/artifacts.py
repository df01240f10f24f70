"""Damage saved and exported folders at random and count what happens when they are loaded.

    python reliability/artifacts.py --tries 400

Allowed are an error of `pp_fx.errors`, a load that gives the logits of the undamaged folder, and other logits where a
setting was changed to another valid one. Anything else is a failure.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from soak import VOCABULARY, tiny
from transformers import AutoModelForCausalLM

import pp_fx
from pp_fx.calibration.history_file import HISTORY_FILE
from pp_fx.errors import PpFxError
from pp_fx.export.folder import DATA, MODEL, SETTINGS, STATEFUL

RESULTS = Path(__file__).parent / "results" / "artifacts.json"
NUMBERS: tuple[Any, ...] = (-1, 0, 10**30, -(10**9), 1e308, "1", None, [], {}, True)


def truncate(path: Path, source: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: source.randrange(len(content))])


def flip(path: Path, source: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(source.randint(1, 4)):
        content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(content)


def extend(path: Path, source: random.Random) -> None:
    with path.open("ab") as file:
        file.write(source.randbytes(source.randint(1, 5000)))


def remove(path: Path, source: random.Random) -> None:
    path.unlink()


def change_setting(path: Path, source: random.Random) -> None:
    """One value of the pruning configuration becomes another, or an unknown or very deep one is added."""
    document = json.loads(path.read_text())
    settings = document.get("quantization_config", document.get("config"))
    ours = sorted(settings.keys() - {"quant_method"})  # transformers itself reads that one
    key, value = source.choice(ours), source.choice(NUMBERS)
    if source.random() < 0.2:
        key, value = source.choice((("../../etc", 1), ("deep", json.loads("[" * 400 + "]" * 400))))
    settings[key] = value
    path.write_text(json.dumps(document))


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (truncate, flip, extend, remove)


def saved_folder(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def exported_folder(folder: Path) -> Any:
    return pp_fx.export.OrtModel.from_pretrained(folder, threads=1)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 82).view(2, 40) % VOCABULARY
    with torch.no_grad():
        return model(input_ids=ids).logits


def attempt(whole: Path, load: Callable[[Path], Any], expected: torch.Tensor, source: random.Random) -> tuple[str, str]:
    """Damage a copy of a folder and load it: what was done, and what came of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "copy")
        shutil.copytree(whole, folder)
        files = [MODEL, STATEFUL, DATA, SETTINGS, "config.json"] if load is exported_folder else [HISTORY_FILE]
        file = source.choice([*files, "a setting"])
        damage = change_setting if file == "a setting" else source.choice(DAMAGES)
        path = folder / (file if file != "a setting" else SETTINGS if load is exported_folder else "config.json")
        damage(path, source)
        done = f"{damage.__name__.replace('_', ' ')}: {path.name}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = logits(load(folder))
        except PpFxError:
            return done, "refused"
        except Exception as error:  # whatever it is, it is what we are looking for
            return done, f"FAILED: {type(error).__name__}: {str(error)[:200]}"
    if found.shape == expected.shape and torch.equal(found, expected):
        return done, "harmless"
    return done, "changed setting" if damage is change_setting else "FAILED: other logits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=400, help="of each kind of folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[str, Counter] = {}
    failures = []
    with tempfile.TemporaryDirectory() as name:
        model = tiny()
        model.save_pretrained(Path(name, "saved"))
        pp_fx.export.onnx(model, Path(name, "exported"))
        for kind, load in (("saved", saved_folder), ("exported", exported_folder)):
            expected, source = logits(load(Path(name, kind))), random.Random(0)
            for _ in track(range(options.tries), kind, console=Console(stderr=True)):
                done, result = attempt(Path(name, kind), load, expected, source)
                counts.setdefault(kind, Counter())[result.partition(":")[0]] += 1
                if result.startswith("FAILED"):
                    failures.append({"folder": kind, "damage": done, "result": result})
    document = {"counts": {k: dict(v) for k, v in counts.items()}, "failures": failures}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    Console().print_json(data=document)


if __name__ == "__main__":
    main()
