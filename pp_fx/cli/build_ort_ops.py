"""`pp-fx build-ort-ops`."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import export
from ..requirements import versions
from .app import app
from .options import Json, console_for, write_json


@app.command("build-ort-ops")
def build_ort_ops_command(
    compiler: Annotated[str | None, typer.Option(help="g++ or clang++; default: the first one found.")] = None,
    json_file: Json = None,
) -> None:
    """Compile the native onnxruntime kernels for this machine: exported models then decode faster."""
    library = export.build_ort_ops(compiler=compiler)
    write_json({"library": str(library), "versions": versions()}, json_file)
    console_for(json_file).print(f"{library}: pp_fx.export.OrtModel uses it from now on", soft_wrap=True)
