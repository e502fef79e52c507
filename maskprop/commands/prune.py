"""`maskprop prune`: choose masks on a model's coupled groups and write them to a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskprop.commands import Command
from maskprop.commands.options import (
    add_json,
    add_model,
    add_progress,
    build,
    check_file,
    inputs_for,
    step,
    write_json,
)

if TYPE_CHECKING:
    from rich.table import Table

    from maskprop.pruning import Removal

# What can be told from the weights alone: a command line has no data.
SCORES = {
    "l1": "L1",
    "l2": "L2",
    "fpgm": "FPGM",
    "lamp": "LAMP",
    "random": "Random",
    "bn-scale": "BatchNormScale",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, how much to prune of it, and where the masks go."""
    default = "(default: %(default)s)"
    add_model(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the masks there: .pt, .pth or .safetensors")
    parser.add_argument("--ratio", type=float, default=0.5, help=f"share of the units of a group {default}")
    for what in ("parameters", "flops"):
        parser.add_argument(
            f"--max-{what}",
            type=_limit,
            metavar="N",
            help=f"prune no further than until so many {what} are left: a share of the dense model (0.4 or 40%%) or a "
            "number (5000000, 5M); --ratio then says how much one group is pruned beside another",
        )
    parser.add_argument("--score", choices=SCORES, default="l1", help=f"the lowest units go {default}")
    parser.add_argument(
        "--ranking",
        choices=("local", "global", "isomorphic"),
        default="local",
        help=f"each group loses its share, all groups compete, or those of one structure {default}",
    )
    parser.add_argument(
        "--granularity",
        action="append",
        metavar="KIND",
        help="channel, head, 'head dim', ...; may be repeated",
    )
    parser.add_argument("--ignore", action="append", default=[], metavar="GLOB", help="modules to leave whole")
    parser.add_argument("--channel-multiple", type=int, default=1, metavar="N", help="keep a multiple of N")
    parser.add_argument("--min-units", type=int, default=1, metavar="N", help="keep N units of a group")
    add_json(parser)
    add_progress(parser)


def _limit(text: str) -> float:
    """``0.4`` or ``40%`` is a share (a float), ``5000000`` or ``5M`` a number (an int)."""
    units = {"%": 0.01, "K": 10**3, "M": 10**6, "G": 10**9}
    try:
        if text[-1:].upper() in units:
            value = float(text[:-1]) * units[text[-1:].upper()]
            return value if text.endswith("%") else int(value)
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a share, as 0.4 or 40%, nor a number, as 5M") from None


def run(arguments: argparse.Namespace) -> int:
    """Find the groups, choose the units, write the masks, print what will be left."""
    from rich.console import Console

    from maskprop.pruning import Budget, Pruner, save_nni_masks, scores

    if arguments.out is not None:
        check_file(arguments.out, (".pt", ".pth", ".safetensors"))
    limits = arguments.max_parameters, arguments.max_flops
    with step("Choosing masks", arguments):
        source, model = build(arguments.model, arguments)
        score = getattr(scores, SCORES[arguments.score])()
        pruner = Pruner(
            model,
            arguments.ratio,
            dummy_input=inputs_for(source, model, arguments),
            score=score,
            ignore=arguments.ignore,
            ranking=arguments.ranking,
            granularity=arguments.granularity,
            channel_multiple=arguments.channel_multiple,
            min_units=arguments.min_units,
            budget=None if limits == (None, None) else Budget(*limits),
        )
        removal = pruner.prune()
    if arguments.out is not None:
        save_nni_masks(arguments.out, model, removal.masks)
    if arguments.json:
        write_json({"model": arguments.model, **_facts(removal)})
        return 0
    console = Console()
    facts = _facts(removal)
    costs = ", ".join(f"{k} {facts[k]['before']:,} → {facts[k]['after']:,}" for k in ("parameters", "flops"))
    console.print(f"{arguments.model}: {costs}", highlight=False, markup=False, soft_wrap=True)
    console.print(_table(facts))
    if arguments.out is not None:
        console.print(f"Masks: {arguments.out}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _facts(removal: Removal) -> dict[str, Any]:
    """What is kept of every group, and the cost before and after."""
    assert removal.forecast is not None
    assert removal.groups.structure is not None
    dense, left = removal.groups.structure.dense, removal.forecast
    return {
        "parameters": {"before": dense.parameters, "after": left.parameters},
        "flops": {"before": dense.flops, "after": left.flops},
        "groups": [
            {"name": g.name, "granularity": g.granularity, "before": g.size, "after": kept}
            for g, kept in ((removal.groups[name], kept) for name, kept in removal.kept.items())
        ],
    }


def _table(facts: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table()
    for title in ("group", "granularity", "units", "kept"):
        table.add_column(title, justify="right" if title in ("units", "kept") else "left", overflow="fold")
    for group in facts["groups"]:
        table.add_row(group["name"], group["granularity"], str(group["before"]), str(group["after"]))
    return table


COMMAND = Command(
    "prune",
    "Choose masks for a model on its coupled groups, and write them to a file.",
    add_arguments,
    run,
    "  maskprop prune torchvision:resnet18 --weights weights.pt --ratio 0.5 --out masks.pt\n"
    "  maskprop prune torchvision:resnet50 --max-flops 40% --ranking global --out masks.safetensors\n"
    "  maskprop prune timm:vit_tiny_patch16_224 --granularity head --granularity 'head dim' --json\n"
    "  maskprop compact torchvision:resnet18 --weights weights.pt --masks masks.pt --out small",
)
