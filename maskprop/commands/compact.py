"""`maskprop compact`: a model and masks in, a directory with the compact model out."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskprop.commands import Command
from maskprop.commands.options import (
    add_json,
    add_model,
    add_progress,
    build,
    create,
    inputs_for,
    step,
    write_json,
)


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
    parser.add_argument("--no-verify", action="store_true", help="do not compare with the masked model")
    add_json(parser)
    add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Speed up, save, report."""
    from rich.console import Console

    from maskprop.speedup import ModelSpeedup
    from maskprop.storage import save

    create(arguments.out)
    with step("Building the model", arguments):
        source, model = build(arguments.model, arguments)
        dummy = inputs_for(source, model, arguments)
        speedup = ModelSpeedup(
            model,
            dummy,
            arguments.masks,
            constants=arguments.constants,
            channel_multiple=arguments.channel_multiple,
            verify=not arguments.no_verify,
        )
    with step("Speeding up", arguments):
        speedup.speedup_model()
    with step("Saving", arguments):
        if source.kind == "hf":
            from maskprop.hf import save_pretrained

            save_pretrained(model, arguments.out)
        else:
            save(model, arguments.out, source=None if source.kind == "saved" else arguments.model)
        (arguments.out / "report.json").write_text(speedup.report.to_json() + "\n", encoding="utf-8")
        speedup.report.to_html(arguments.out / "report.html")
    if arguments.json:
        write_json(speedup.report.to_dict())
    else:
        console = Console()
        console.print(str(speedup.report), markup=False, highlight=False, soft_wrap=True)
        console.print(f"Wrote the model and its report to {arguments.out}", highlight=False)
    return 0


COMMAND = Command(
    "compact",
    "Make a masked model small and save it.",
    add_arguments,
    run,
    "  maskprop compact torchvision:resnet50 --weights weights.pt --masks masks.safetensors --out small\n"
    "  maskprop compact model.py:build --input 1,28,28 --masks masks.pt --out small --channel-multiple 8",
)
