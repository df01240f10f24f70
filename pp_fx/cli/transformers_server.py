"""transformers' server (`transformers serve`) with pp_fx imported: what `pp-fx serve --engine transformers` becomes.

    python -m pp_fx.cli.transformers_server PRUNING serve MODEL [options of transformers serve]

PRUNING: a ProbePruningConfig as JSON, with which dense models are loaded; "" for a model that was saved with its own.
"""

from __future__ import annotations

import os
import sys

from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.transformers import app

from ..config import ProbePruningConfig
from ..integrations.hf_config import ProbePruningHfConfig
from ..runtime.modes import put_back


def main(pruning: str, arguments: list[str]) -> None:
    """Serve until Ctrl-C.

    Args:
        pruning: see the module.
        arguments: of transformers' command line, `serve` first.
    """
    if not pruning:
        app(arguments)
        return
    given = ProbePruningHfConfig(ProbePruningConfig.from_json(pruning))
    # the server has no option for it: of what is to be done to the weights it asks this method alone
    with put_back([ModelManager], get_quantization_config=lambda self: given):
        app(arguments)


def _run() -> int:
    """`main`; the exit status."""
    try:
        main(sys.argv[1], sys.argv[2:])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    status = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    # the thread that runs the steps outlives the server and would be waited for, forever (transformers 5.23)
    os._exit(status)
