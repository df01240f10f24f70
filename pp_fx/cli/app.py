"""The command line `pp-fx`: its frame, and errors in one line."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from .._version import __version__
from ..errors import PpFxError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_debug = False


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pp-fx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Probe Pruning: run only the attention heads and MLP channels that a batch needs.

    Begin with `pp-fx demo`; `pp-fx explain MODEL` tells what of a model can be pruned, `pp-fx eval` what it costs in
    perplexity, `pp-fx bench` what it saves in time, `pp-fx report` shows both; `pp-fx export` writes ONNX.

    Exit codes: 0, done; 1, an error of the input, in one line; 2, wrong usage.
    """
    global _debug
    _debug = debug


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors in one line, exit code 1. `arguments`: without the program's name; default: those given."""
    try:
        app(arguments)
    except PpFxError as error:
        if _debug:
            raise
        text = _named_as_options(str(error), sys.argv[1:] if arguments is None else arguments)
        Console(stderr=True).print(f"pp-fx: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _named_as_options(message: str, arguments: list[str]) -> str:
    """An error of the Python API with its arguments called as the command calls them: overwrite=True, --overwrite.

    What stands in quotes are values.
    """
    commands: Any = typer.main.get_command(app)
    command = next((commands.commands[a] for a in arguments if a in commands.commands), None)
    options = [o for p in getattr(command, "params", []) for o in p.opts if o.startswith("--")]

    def renamed(text: str) -> str:
        for option in options:
            name = option[2:].replace("-", "_")
            text = re.sub(rf"\b{name}=True\b", option, text)
            text = re.sub(rf"(?<![\w./-]){name}(?==)", option, text)
            if "_" in name:
                text = re.sub(rf"(?<![\w./-]){name}\b", option, text)
        return text

    parts = re.split(r"('[^']*')", message)
    return "".join(part if part.startswith("'") else renamed(part) for part in parts)
