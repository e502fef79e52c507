"""`maskprop bench`: parameters, operations, size and latency of models side by side."""

from __future__ import annotations

import argparse
from typing import Any

from maskprop.commands import Command
from maskprop.commands.options import (
    MODEL_HELP,
    add_inputs,
    add_json,
    add_progress,
    build,
    inputs_for,
    step,
    write_json,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The models and the batch sizes."""
    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL_HELP)
    add_inputs(parser)
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 16],
        metavar="N",
        help="batch sizes to time (default: 1 16)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that each model has (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own)")
    add_json(parser)
    add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print one column a model."""
    from rich.console import Console

    from maskprop.errors import OptionError

    if min(arguments.batches) < 1 or arguments.rounds < 1:
        raise OptionError("--batches and --rounds take whole numbers of at least 1.")
    with step("Measuring", arguments):
        results = _measure(arguments)
    if arguments.json:
        write_json(results)
    else:
        Console().print(_table(results))
    return 0


def _measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    import torch

    from maskprop import measure
    from maskprop.graph.trace import split_inputs, trace
    from maskprop.view.costs import count_flops, dense_shape

    before = torch.get_num_threads()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        built = {name: build(name, arguments) for name in dict.fromkeys(arguments.models)}
        models = {name: model for name, (_, model) in built.items()}
        results: dict[str, dict[str, float]] = {}
        for name, (source, model) in built.items():
            one = split_inputs(inputs_for(source, model, arguments, batch=1))
            results[name] = {
                "parameters": measure.count_parameters(model),
                "flops": sum(count_flops(trace(model, one), dense_shape).values()),
                "bytes": measure.file_size(model),
            }
        for batch in arguments.batches:
            source, model = next(iter(built.values()))
            inputs = split_inputs(inputs_for(source, model, arguments, batch=batch))
            bound = {name: _bind(model, inputs) for name, model in models.items()}
            for name, seconds in measure.latencies(bound, rounds=arguments.rounds).items():
                results[name][f"seconds at batch {batch}"] = seconds
        return results
    finally:
        torch.set_num_threads(before)


def _bind(model: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The model as one that needs no arguments."""
    from torch import nn

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Any:
            return self.model(*inputs[0], **inputs[1])

    return Bound()


def _table(results: dict[str, dict[str, float]]) -> object:
    from rich.table import Table

    table = Table("")
    for name in results:
        table.add_column(name, justify="right", overflow="fold")
    first = next(iter(results.values()))
    for key in first:
        row = [f"{r[key] * 1e3:.2f} ms" if key.startswith("seconds") else f"{int(r[key]):,}" for r in results.values()]
        table.add_row(key.replace("seconds", "latency"), *row)
    return table


COMMAND = Command(
    "bench",
    "Measure models side by side: parameters, operations, size, latency.",
    add_arguments,
    run,
    "  maskprop bench torchvision:resnet50 saved:small\n"
    "  maskprop bench model.py:dense model.py:small --input 1,28,28 --batches 1 64 --threads 1 --json",
)
