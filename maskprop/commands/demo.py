"""`maskprop demo`: train, prune, speed up, compare. It needs no network and takes under a minute."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from maskprop.commands import Command
from maskprop.commands.options import add_json, add_progress, created, write_json
from maskprop.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo."""
    default = "(default: %(default)s)"
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the report and a picture there")
    parser.add_argument("--sparsity", type=float, default=0.7, help=f"share of rows to prune {default}")
    parser.add_argument(
        "--epochs",
        type=int,
        default=12,
        help="epochs of training before pruning; below about 8 the norms do not tell yet which rows matter, and the "
        f"masked network loses accuracy; below about 4 the dense one has not learned anything either {default}",
    )
    parser.add_argument("--seed", type=int, default=0, help=f"for data, weights and batches {default}")
    add_json(parser)
    add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check the options, run the demo, print its table."""
    if not 0 <= arguments.sparsity < 1:
        raise OptionError(f"--sparsity is {arguments.sparsity}; it is a share, at least 0 and below 1.")
    if arguments.epochs < 1:
        raise OptionError(f"--epochs is {arguments.epochs}; give at least 1.")
    from rich.console import Console

    from maskprop.demo.run import demo

    with created(arguments.out) if arguments.out is not None else nullcontext():
        results = demo(
            Console(stderr=arguments.json),
            arguments.out,
            sparsity=arguments.sparsity,
            epochs=arguments.epochs,
            seed=arguments.seed,
            progress=not arguments.no_progress,
        )
    if arguments.json:
        write_json({name: asdict(result) for name, result in results.items()})
    return 0


COMMAND = Command(
    "demo",
    "Train a small network on handwritten digits, prune it, speed it up, and compare.",
    add_arguments,
    run,
    "  maskprop demo\n  maskprop demo --sparsity 0.5 --epochs 8 --out demo",
)
