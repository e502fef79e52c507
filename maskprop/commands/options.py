"""Options that several sub-commands share. Nothing heavy is imported here: `maskprop --help` is quick."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from maskprop.commands.sources import Source

MODEL_HELP = (
    "the model: torchvision:NAME, timm:NAME, hf:DIR (a save_pretrained directory), saved:DIR (written by "
    "maskprop), DIR for either, file.py:factory or package.module:factory; arguments as ?num_classes=10. Only the last "
    "two run code of yours"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """`MODEL` and what belongs to it."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a state_dict to load, .pt or .safetensors (default: random)",
    )
    add_inputs(parser)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """What the model is run on."""
    parser.add_argument(
        "--input",
        metavar="SHAPE",
        help="shape of an input without the batch, as 3,224,224; token ids as int1000:16; several separated "
        "by ';', keywords as name=SHAPE (default: guessed from the model)",
    )
    parser.add_argument("--batch", type=int, default=2, help="batch size (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: %(default)s)")
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="run generated forwards of saved models that call more than torch",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="write the result as JSON to stdout")


def add_progress(parser: argparse.ArgumentParser) -> None:
    """`--no-progress`."""
    parser.add_argument("--no-progress", action="store_true", help="show no progress on stderr")


def build(name: str, arguments: argparse.Namespace) -> tuple[Source, nn.Module]:
    """The model that a name stands for, with its weights, in eval mode."""
    import torch

    from maskprop.commands.sources import find_model, load_weights

    source = find_model(name, arguments.trust_code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        model = source.build()
    if getattr(arguments, "weights", None) is not None:
        load_weights(model, arguments.weights)
    return source, model.eval()


def inputs_for(
    source: Source, model: nn.Module, arguments: argparse.Namespace, batch: int | None = None, seed: int = 0
) -> Any:
    """Random inputs of the shapes that were asked for, in the form of a dummy input."""
    from maskprop.commands.sources import make_inputs
    from maskprop.errors import OptionError

    size = arguments.batch if batch is None else batch
    if size < 1:
        raise OptionError(f"--batch is {size}; give at least 1.")
    return make_inputs(source, model, arguments.input, size, arguments.seed + seed)


def write_json(value: Any) -> None:
    """Plain JSON to stdout, whatever the terminal's width. It knows no infinity: that is written as null."""
    import sys

    sys.stdout.write(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def step(text: str, arguments: argparse.Namespace) -> Iterator[None]:
    """A spinner on stderr while something takes time."""
    from rich.console import Console

    console = Console(stderr=True, quiet=getattr(arguments, "no_progress", False))
    with console.status(text):
        yield


@contextmanager
def created(out: Path) -> Iterator[None]:
    """Create a directory before anything takes time; if what follows fails, take away what is empty of it.

    Raises:
        OptionError: it cannot be created.
    """
    from maskprop.errors import OptionError

    new = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"--out {out}: this directory cannot be created ({error.strerror}). Choose another."
        ) from error
    try:
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        raise


def check_file(out: Path, suffixes: tuple[str, ...]) -> None:
    """See that a file can be written before anything takes time.

    Raises:
        OptionError: its suffix is none of these, it is a directory, or its directory is missing.
    """
    from maskprop.errors import OptionError

    if out.suffix not in suffixes or out.is_dir():
        raise OptionError(f"--out {out}: give a file that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}.")
    if not out.parent.is_dir():
        raise OptionError(f"--out {out}: there is no directory '{out.parent}'. Create it first.")
