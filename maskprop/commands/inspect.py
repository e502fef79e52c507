"""`maskprop inspect`: what a model is made of, which units leave together, and what each costs."""

from __future__ import annotations

import argparse

from maskprop.commands import Command
from maskprop.commands.options import add_json, add_model, add_progress, build, inputs_for, step, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the form of the answer."""
    add_model(parser)
    parser.add_argument("--members", action="store_true", help="also list the parameters of every group")
    add_json(parser)
    add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trace the model, find its groups, print them."""
    from rich.console import Console

    from maskprop.graph.trace import split_inputs, trace
    from maskprop.pruning.discover import prunable_groups
    from maskprop.view.costs import count_flops, dense_shape

    with step("Tracing", arguments):
        source, model = build(arguments.model, arguments)
        dummy = inputs_for(source, model, arguments)
        flops = sum(count_flops(trace(model, split_inputs(dummy)), dense_shape).values())
        groups = prunable_groups(model, dummy)
    parameters = sum(p.numel() for p in model.parameters())
    if arguments.json:
        facts = {"model": arguments.model, "parameters": parameters, "flops": flops, "batch": arguments.batch}
        write_json({**facts, **groups.to_dict(indices=False)})
        return 0
    console = Console()
    console.print(
        f"{arguments.model}: {parameters:,} parameters, {flops:,} FLOPs (batch {arguments.batch})",
        highlight=False,
    )
    console.print(groups.table())
    if arguments.members:
        for group in groups:
            console.print(str(group), highlight=False, markup=False)
    return 0


COMMAND = Command(
    "inspect",
    "Show which units of a model leave together and what each costs.",
    add_arguments,
    run,
    "  maskprop inspect torchvision:resnet18\n"
    "  maskprop inspect 'torchvision:vit_b_16?image_size=64' --json\n"
    "  maskprop inspect model.py:build --input 1,28,28 --members",
)
