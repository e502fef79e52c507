"""The command `maskprop`: a parser over the sub-commands in `maskprop.commands`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from maskprop import __version__
from maskprop.commands import load_commands
from maskprop.errors import MaskpropError

_EPILOG = """\
from a model to a small one:
  maskprop inspect torchvision:resnet18                                 what leaves together, what it costs
  maskprop prune   torchvision:resnet18 --ratio 0.5 --out masks.pt      choose units
  maskprop compact torchvision:resnet18 --masks masks.pt --out small    take them out, verify, save
  maskprop show    small                                                what became of each layer
  maskprop bench   torchvision:resnet18 saved:small                     what it gains here
  maskprop export  saved:small --out small.onnx                         for elsewhere

  maskprop COMMAND --help has the options and more examples; eval "$(maskprop completion bash)" completes them.
  Results go to stdout (--json: as data), progress and errors to stderr.

exit status: 0 done, 1 an error, 2 the command line is not understood, 3 verify found a difference
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command; the chosen command's `run` is in the result as `run`."""
    parser = argparse.ArgumentParser(
        prog="maskprop",
        description="Turn a PyTorch model with pruning masks into the same model, smaller.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"maskprop {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in load_commands():
        examples = f"examples:\n{command.examples}" if command.examples else None
        sub = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments, without the program's name; by default those of the process.

    Returns:
        The exit status: 0; 1 after an error, which is written to stderr on one line (with `--debug`, the
        traceback too); 3 if `verify` finds that outputs differ. A command line that does not parse raises
        `SystemExit(2)`, as argparse does.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except BrokenPipeError:  # whoever read the output has seen enough
        return 1
    except Exception as error:  # a user's factory, model or file may raise anything
        console = Console(stderr=True)
        if arguments.debug:
            console.print_exception()
        text = " ".join(str(error).split()) if isinstance(error, MaskpropError) else _foreign(error)
        console.print(f"{type(error).__name__}: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130


def _foreign(error: Exception) -> str:
    """The first line of an error that is not maskprop's, and how to see where it came from."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{first} (run again with --debug for the traceback)"
