"""`optimum-cli export pp-onnx`: the same as `pp-fx export`.

Installed into the namespace `optimum.commands.register`, where optimum looks for commands of other packages; so there
is no `__init__.py` here. optimum imports this file at every start of its command line: nothing heavy is imported.
"""

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

_OPTIONS = {
    "--mlp-ratio": "share of MLP channels dropped (default 0.4)",
    "--attention-ratio": "share of query heads dropped (default 0)",
    "--skip-layers": "the first so many layers stay dense (default 3)",
    "--preset": "default, paper or another method",
    "--config": "JSON file of a ProbePruningConfig",
    "--calibration": "UTF-8 file of sample text, or none",
    "--dtype": "float32 or float16",
    "--opset": "ONNX opset, 23 or 24",
    "--json": "write the comparison with torch to this file",
}


class PpOnnxExportCommand(BaseOptimumCLICommand):
    """Hands its arguments on to `pp-fx export`."""

    COMMAND = CommandInfo("pp-onnx", "Export a model that is pruned while it runs (pp_fx) to ONNX.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("model", help="folder, hub id, or smollm2 (embedded)")
        parser.add_argument("directory", help="folder to write")
        for name, text in _OPTIONS.items():
            parser.add_argument(name, help=text)
        parser.add_argument("--overwrite", action="store_true", help="replace the folder of an earlier export")

    def run(self) -> None:
        from pp_fx.cli import main

        assert self.args is not None
        arguments = ["export", self.args.model, self.args.directory]
        for name in _OPTIONS:
            value = getattr(self.args, name[2:].replace("-", "_"))
            arguments += [] if value is None else [name, value]
        main(arguments + ["--overwrite"] * self.args.overwrite)


REGISTER_COMMANDS = [(PpOnnxExportCommand, ExportCommand)]
