"""The sub-commands of `maskprop`, one module each.

A module of this package that is named in `NAMES` has a `COMMAND`. It imports nothing heavy at its top, so
that `maskprop --help` is quick; what a command needs it imports when it runs.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass

NAMES = ("demo", "inspect", "prune", "compact", "verify", "bench", "export", "show", "completion")


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        name: what the user types.
        help: one sentence.
        examples: command lines that the command's own help ends with.
        add_arguments: adds the command's options to its parser.
        run: takes the parsed arguments and returns the exit status. It raises `MaskpropError` for what the
            user can mend.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    examples: str = ""


def load_commands() -> list[Command]:
    """All sub-commands, in the order of `NAMES`."""
    return [importlib.import_module(f"{__name__}.{name}").COMMAND for name in NAMES]
