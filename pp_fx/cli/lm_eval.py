"""`pp-fx lm-eval`."""

from __future__ import annotations

import sys

import typer

from ..errors import InputError
from .app import app


@app.command(
    "lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def lm_eval_command(context: typer.Context) -> None:
    """lm-eval's own command line (its arguments follow), which then knows models that were saved with their pruning."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise InputError(f"lm-eval needs the package {error.name}; run: pip install 'pp-fx[eval]'") from None
    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()
