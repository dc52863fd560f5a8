"""The command `hf-moe-ted`. Each group of commands has a module; their order is set here.

Each command imports what it needs when it runs, so `--help` and wrong arguments do not wait for torch.
"""

import sys
from typing import Annotated

import typer

from .compress import aggregate, expert_statistics, merge, prune, quantize, report, trim
from .convert import convert, export
from .errors import one_line_errors
from .evaluate import evaluate
from .models import init, inspect
from .plan import plan
from .serve import serve
from .translate import translate


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from .. import __version__

        print(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    """Multilingual MoE translation models."""


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},  # --base_config is --base-config
)
app.callback()(_root)
for command in (
    *(translate, serve, plan, init, inspect, prune, expert_statistics, merge, aggregate, quantize, trim),
    *(evaluate, report),
):
    app.command()(command)
app.add_typer(convert, name="convert")
app.add_typer(export, name="export")


def run(*command: str) -> None:
    """Run the command line. A `ValueError` or a file error ends it with one line, without a stack trace.

    Args:
        command: words before the arguments of the process, `"convert", "deepspeed"` for a script that is one command.
    """
    with one_line_errors():
        app([*command, *sys.argv[1:]], prog_name="hf-moe-ted")


__all__ = ["app", "run"]
