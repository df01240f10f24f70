"""The command `pp-fx`: a file of its own, so that an interrupt while torch is imported (seconds) ends quietly, too."""

import sys


def main() -> None:
    """Run `pp_fx.cli.main`; exit code 130 after Ctrl-C."""
    try:
        from pp_fx.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
