"""Write docs/families.md: what was checked for every decoder family.

    python docs/families.py            # all, in minutes
    python docs/families.py Bloom MPT  # only these rows

The checks are those of tests/helpers/family_checks.py on tiny random models of each family.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pp_fx  # noqa: E402
from pp_fx.capture.layers import find_layers, structure_key  # noqa: E402
from pp_fx.rewrite.structures import find_structures  # noqa: E402
from tests.helpers.families import FAMILIES, build  # noqa: E402
from tests.helpers.family_checks import CHECKS  # noqa: E402
from tests.helpers.zeroed import PRUNED, layers_of, transformed  # noqa: E402

TEXT = f"""# Decoder families

Made by `python docs/families.py` with torch {torch.__version__.split("+")[0]} and \
transformers {transformers.__version__}; `make families` tests the same, and the test suite one family of each
kind. Support comes from the structure of a layer, not from its name: a family that is not here works if its layers
are built like one that is. `pp-fx explain` tells it of any model from its configuration alone.

- *exact at 0*: with ratio 0, logits and generated tokens are bit for bit those of the untransformed model, with and
  without left padding.
- *reference*: the kept channels and heads are those that the paper's formula gives on the original model.
- *DynamicCache*: prefill and decoding equal the original model with its dropped channels zeroed (1e-4 of the logits).
- *StaticCache, compiled*: the same under `torch.compile(fullgraph=True)`; "not in transformers" where the untransformed
  model cannot do it either, or gives wrong results.
- *ONNX*: the exported model gives torch's logits and kept units under onnxruntime, prefill and decoding, with and
  without padding, with a row of zeros in the embedding.
- *kept*: of a layer at 40% MLP and attention; *capture s*: seconds for one distinct structure.

"""


def exported(name: str) -> str:
    """Whether onnxruntime gives what torch gives: prefill and decoding, padded and not, a zero row among the inputs."""
    model = transformed(build(name), PRUNED)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model.get_input_embeddings().weight[0] = 0
        pp_fx.calibrate(model, torch.randint(2, 97, (4, 40)), progress=False)
        try:
            pp_fx.export.onnx(model, Path(folder, "out"))
            pp_fx.export.check(Path(folder, "out")).require()
        except pp_fx.errors.PpFxError as error:
            return f"no: {' '.join(str(error).replace('|', '/').split())[:160]}"
    return "yes"


def row(name: str) -> dict[str, Any]:
    """The checks of one family."""
    cells: dict[str, Any] = {"family": name}
    for check, function in CHECKS.items():
        if check.startswith("Static") and not FAMILIES[name].static:
            cells[check] = "not in transformers"
            continue
        try:
            function(name)
            cells[check] = "yes"
        except Exception as error:  # the table is the report
            cells[check] = f"no ({type(error).__name__})"
    model = build(name)
    layers = find_layers(model)[1]
    find_structures(model, layers)  # the first capture of a process also loads torch.export
    start = time.perf_counter()
    find_structures(model, layers)
    seconds = (time.perf_counter() - start) / len({structure_key(layer) for layer in layers})
    layer: Any = layers_of(transformed(model, PRUNED))[-1]
    for title, kind in (("kept heads", "attention"), ("kept channels", "mlp")):
        state = layer.states().get(kind)
        cells[title] = "all" if state is None else f"{state.kept_units} of {state.units}"
    cells["ONNX"] = exported(name)
    return {**cells, "capture s": f"{seconds:.1f}", "not pruned": "; ".join(layer.reasons).replace("|", "/")}


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    page, names = ROOT / "docs" / "families.md", sys.argv[1:] or list(FAMILIES)
    rows = {name: row(name) for name in track(names, "families")}
    head = list(next(iter(rows.values())))
    lines = {name: f"| {' | '.join(cells.values())} |" for name, cells in rows.items()}
    for line in page.read_text(encoding="utf-8").splitlines() if page.exists() else ():
        if line.startswith("| "):
            lines.setdefault(line.split("|")[1].strip(), line)
    table = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |", *(lines[name] for name in FAMILIES)]
    page.write_text(TEXT + "\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
