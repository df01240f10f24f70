"""What commands that take `--text` or `--task` share: the options of a task, its checks, its table."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..checks import check_choice, check_integers
from ..errors import InputError
from ..measure.humaneval import Problem, read_problems
from ..measure.run_programs import require_limits
from ..measure.run_task import TASKS
from ..ranks import world
from ..text import PYTHON_DOCS
from .options import write_json

Text = Annotated[str | None, typer.Option(help=f"UTF-8 file, or {PYTHON_DOCS}; or give --task.")]
Task = Annotated[
    str | None, typer.Option(help=f"In place of --text: {', '.join(TASKS)}. Runs programs that the model writes.")
]
Problems = Annotated[int | None, typer.Option("--problems", help="Of --task, from the first on; left out: all.")]
NewTokens = Annotated[int, typer.Option(help="Of --task: tokens generated for a problem, at most.")]
_WARNING = (
    "Programs that the model writes are run on this machine, under limits of time, memory and files. Limits are no "
    "sandbox: for a model that you do not trust use a container."
)


def check_text_or_task(
    context: typer.Context, text: str | None, task: str | None, of_text: tuple[str, ...], of_task: tuple[str, ...]
) -> None:
    """One of the two, and of the options that belong to one alone none of the other's.

    Args:
        context: of the command, which knows the options that were typed.
        text, task: their values.
        of_text, of_task: parameters of the command that have a meaning with one alone.

    Raises:
        InputError: both, neither, or an option of the other.
    """
    if (text is None) == (task is None):
        raise InputError(f"text={text!r} and task={task!r} exclude each other, and one is needed; give one of them")
    if task is not None:
        check_choice("task", task, TASKS)
    wrong, owner = (of_task, "task") if task is None else (of_text, "text")
    options = {p.name: p.opts[0].removeprefix("--").replace("-", "_") for p in context.command.params}
    for name in wrong:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"{options[name]}={context.params[name]!r} has a meaning with --{owner} alone; leave it out, or give "
                f"--{owner}"
            )


def problems_of(count: int | None, batch: int, new_tokens: int) -> list[Problem]:
    """The problems of a task, with a warning on stderr; what is wrong is found before the weights are read."""
    check_integers(1, batch=batch, new_tokens=new_tokens)
    problems = read_problems(count)
    require_limits()
    Console(stderr=True).print(_WARNING, style="yellow")
    return problems


def check_one_process(task: str | None) -> None:
    """A task is not shared among processes.

    Raises:
        InputError: there are more than one.
    """
    if task is not None and world()[1] > 1:
        raise InputError(f"task={task!r} runs on one process, there are {world()[1]}; start it without torchrun")


def show_task(result: dict[str, Any], json_file: str | None, console: Console) -> None:
    """Table and JSON of `run_task`."""
    write_json(result, json_file)
    table = Table(title=f"{result['model']}, {result['task']}, {result['problems']} problems")
    for column in ("", "solved", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for side in ("dense", "pruned"):
        table.add_row(side, str(result[side]["solved"]), f"{result[side]['seconds']:.1f}")
    low, high = result["interval"]
    difference = result["pruned"]["solved"] - result["dense"]["solved"]
    if json_file != "-":
        console.print(table)
        console.print(f"pruned - dense: {difference:+d} (95%: {low:+.1f} to {high:+.1f})", highlight=False)
