"""`maskprop verify`: do two models, or a model and its masked self, compute the same?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from maskprop.commands import Command
from maskprop.commands.options import (
    MODEL_HELP,
    add_json,
    add_model,
    add_progress,
    build,
    inputs_for,
    step,
    write_json,
)

DIFFERENT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One or two models, masks, and how often to look."""
    add_model(parser)
    parser.add_argument("other", metavar="OTHER", nargs="?", help=f"{MODEL_HELP} (default: MODEL, sped up)")
    parser.add_argument("--masks", type=Path, metavar="FILE", help="put these masks on MODEL first")
    parser.add_argument("--samples", type=int, default=3, help="random inputs to compare on (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, help="relative L2 error to accept (default: by the dtype)")
    add_json(parser)
    add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare on random inputs; 3 if any output differs."""
    from rich.console import Console

    from maskprop.errors import OptionError

    if arguments.other is None and arguments.masks is None:
        raise OptionError("verify needs something to compare with: a second model, or --masks FILE.")
    if arguments.samples < 1:
        raise OptionError(f"--samples is {arguments.samples}; give at least 1.")
    with step("Comparing", arguments):
        checks = _compare(arguments)
    passed = all(check["passed"] for check in checks)
    if arguments.json:
        write_json({"passed": passed, "checks": checks})
    else:
        console = Console()
        for check in checks:
            word = "equal" if check["passed"] else "DIFFERENT"
            where = f"sample {check['sample']}, output '{check['output']}'"
            numbers = f"relative error {check['error']:.1e} (tolerance {check['tolerance']:.0e})"
            console.print(f"{where}: {word}, {numbers}", highlight=False, soft_wrap=True)
    return 0 if passed else DIFFERENT


def _compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from maskprop.graph.trace import split_inputs
    from maskprop.rewrite.verify import compare_outputs

    source, model = build(arguments.model, arguments)
    batches = [
        inputs_for(source, model, arguments, batch=arguments.batch + i, seed=i + 1) for i in range(arguments.samples)
    ]
    other = _other(arguments, source, model)
    if arguments.masks is not None:
        _mask(model, arguments.masks)
    found = []
    for i, batch in enumerate(batches):
        inputs = split_inputs(batch)
        expected = _outputs(arguments.model, model, inputs)
        actual = _outputs(arguments.other or f"{arguments.model}, sped up", other, inputs)
        for check in compare_outputs(actual, expected):
            tolerance = check.tolerance if arguments.tolerance is None else arguments.tolerance
            found.append(
                {
                    "sample": i,
                    "output": check.output,
                    "error": check.error,
                    "tolerance": tolerance,
                    "passed": check.error <= tolerance,
                }
            )
    return found


def _outputs(name: str, model: Any, inputs: Any) -> Any:
    """What a model computes.

    Raises:
        DummyInputError: its forward fails.
    """
    from maskprop.errors import DummyInputError
    from maskprop.graph.trace import describe_inputs
    from maskprop.rewrite.verify import run_model

    try:
        return run_model(model, inputs)
    except Exception as error:  # whatever its forward raises
        raise DummyInputError(
            f"the forward of '{name}' failed with {type(error).__name__}: {error}. It was called with "
            f"{describe_inputs(inputs)}. Both models must take the same inputs; say which with --input."
        ) from error


def _other(arguments: argparse.Namespace, source: Any, model: Any) -> Any:
    """The second model, or the first one sped up."""
    if arguments.other is not None:
        return build(arguments.other, argparse.Namespace(**{**vars(arguments), "weights": None}))[1]
    import copy

    from maskprop.speedup import ModelSpeedup

    speedup = ModelSpeedup(copy.deepcopy(model), inputs_for(source, model, arguments), arguments.masks, verify=False)
    return speedup.speedup_model()


def _mask(model: Any, file: Path) -> None:
    """Multiply the masked parameters by their masks."""
    import torch

    from maskprop.masks import load_masks

    with torch.no_grad():
        for name, mask in load_masks(model, file).parameters.items():
            model.get_parameter(name).mul_(mask)


COMMAND = Command(
    "verify",
    "Compare two models, or a model with its masked self; exit with 3 if they differ.",
    add_arguments,
    run,
    "  maskprop verify torchvision:resnet18 --masks masks.pt\n"
    "  maskprop verify torchvision:resnet18 saved:small --weights weights.pt --masks masks.pt",
)
