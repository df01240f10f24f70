"""The command line, run in this process."""

from typer.testing import CliRunner

from pp_fx.cli import app


def run(*args):
    return CliRunner().invoke(app, list(args))
