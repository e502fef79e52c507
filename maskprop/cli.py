"""The command `maskprop`: a parser over the sub-commands in `maskprop.commands`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from maskprop import __version__
from maskprop.commands import load_commands
from maskprop.errors import MaskpropError


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command; the chosen command's `run` is in the result as `run`."""
    parser = argparse.ArgumentParser(
        prog="maskprop", description="Turn a PyTorch model with pruning masks into the same model, smaller."
    )
    parser.add_argument("--version", action="version", version=f"maskprop {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in load_commands():
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments, without the program's name; by default those of the process.

    Returns:
        The exit status: 0, or 1 after an error of maskprop, which is written to stderr without a traceback.
        A command line that does not parse raises `SystemExit(2)`, as argparse does.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except MaskpropError as error:
        Console(stderr=True).print(
            f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        return 130
