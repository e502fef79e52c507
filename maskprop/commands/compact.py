"""`maskprop compact`: a model and masks in, a directory with the compact model out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from maskprop.commands import Command
from maskprop.commands.options import (
    add_json,
    add_model,
    add_progress,
    build,
    created,
    inputs_for,
    step,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from maskprop.commands.sources import Source
    from maskprop.report import Report
    from maskprop.speedup import ModelSpeedup

    _Opened = tuple[nn.Module, Callable[[str], Tensor] | None, Callable[[ModelSpeedup], None]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its masks, where the result goes, and the engine's options."""
    add_model(parser)
    parser.add_argument(
        "--masks", type=Path, required=True, metavar="FILE", help="masks, 1 = keep: .pt, .pth or .safetensors"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where plan.json, model.safetensors and the report go",
    )
    parser.add_argument(
        "--constants",
        choices=("exact", "fold", "drop"),
        default="exact",
        help="what becomes of constants (default: %(default)s)",
    )
    parser.add_argument(
        "--channel-multiple",
        type=int,
        default=1,
        metavar="N",
        help="keep a multiple of N units (default: %(default)s)",
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="load a Hugging Face model whole, instead of one shard after the other (in memory: the model, "
        "instead of one of its files)",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare with the masked model")
    add_json(parser)
    add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Speed up, save, report."""
    from rich.console import Console

    with created(arguments.out):
        report = _compact(arguments)
    if arguments.json:
        write_json(report.to_dict())
    else:
        console = Console()
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
        console.print(f"Wrote the model and its report to {arguments.out}", highlight=False)
    return 0


def _compact(arguments: argparse.Namespace) -> Report:
    from maskprop.commands.sources import find_model
    from maskprop.speedup import ModelSpeedup

    source = find_model(arguments.model, arguments.trust_code)
    in_shards = source.kind == "hf" and not arguments.whole and arguments.weights is None
    with step("Building the model", arguments):
        open_model = _checkpoint if in_shards else _in_memory
        model, read, write = open_model(source, arguments)
        speedup = ModelSpeedup(
            model,
            inputs_for(source, model, arguments),
            arguments.masks,
            constants=arguments.constants,
            channel_multiple=arguments.channel_multiple,
            verify=not arguments.no_verify,
            read=read,
        )
    with step("Speeding up", arguments):
        speedup.speedup_model()
    with step("Saving", arguments):
        write(speedup)
        (arguments.out / "report.json").write_text(speedup.report.to_json() + "\n", encoding="utf-8")
        speedup.report.to_html(arguments.out / "report.html")
    return speedup.report


def _in_memory(source: Source, arguments: argparse.Namespace) -> _Opened:
    """The whole model, as most commands have it."""
    _, model = build(arguments.model, arguments)

    def write(speedup: ModelSpeedup) -> None:
        from maskprop.storage import save

        if source.kind == "hf":
            from maskprop.hf import save_pretrained

            save_pretrained(model, arguments.out)
        else:
            save(model, arguments.out, source=None if source.kind == "saved" else arguments.model)

    return model, None, write


def _checkpoint(source: Source, arguments: argparse.Namespace) -> _Opened:
    """A Hugging Face directory whose shards are read and written one after the other."""
    from rich.console import Console

    from maskprop.checkpoint import Checkpoint
    from maskprop.errors import LoadError

    try:
        checkpoint = Checkpoint(source.name.partition(":")[2], trust_code=arguments.trust_code)
    except LoadError as error:  # from_pretrained may know what to do with the files
        console = Console(stderr=True, quiet=arguments.no_progress)
        console.print(f"Loading the model whole: {error}", markup=False, highlight=False, soft_wrap=True)
        return _in_memory(source, arguments)
    return checkpoint.model, checkpoint.read, lambda speedup: checkpoint.write(speedup, arguments.out)


COMMAND = Command(
    "compact",
    "Make a masked model small and save it.",
    add_arguments,
    run,
    "  maskprop compact torchvision:resnet50 --weights weights.pt --masks masks.safetensors --out small\n"
    "  maskprop compact llama-7b --masks masks.safetensors --out llama-small   # in memory: one of its files\n"
    "  maskprop compact model.py:build --input 1,28,28 --masks masks.pt --out small --channel-multiple 8",
)
