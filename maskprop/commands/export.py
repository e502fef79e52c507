"""`maskprop export`: a model as ONNX, an exported program or TorchScript, compared with the original."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from maskprop.commands import Command
from maskprop.commands.options import add_json, add_model, add_progress, build, inputs_for, step, write_json

FORMATS = {".onnx": "onnx", ".pt2": "program", ".pt": "torchscript", ".ts": "torchscript"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the file and the form."""
    add_model(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="where to write; .onnx, .pt2 or .pt tells the form",
    )
    parser.add_argument(
        "--to", choices=("onnx", "program", "torchscript"), help="the form, if the suffix does not tell"
    )
    parser.add_argument("--fixed-batch", action="store_true", help="only take the batch size of --batch (default: any)")
    add_json(parser)
    add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export, read back, compare on another input."""
    from rich.console import Console

    from maskprop.errors import OptionError

    form = arguments.to or FORMATS.get(arguments.out.suffix)
    if form is None:
        raise OptionError(f"--out {arguments.out}: the suffix tells no form. Use .onnx, .pt2 or .pt, or add --to.")
    if not arguments.out.parent.is_dir():
        raise OptionError(f"--out {arguments.out}: there is no directory '{arguments.out.parent}'. Create it first.")
    if arguments.batch < 2 and not arguments.fixed_batch:
        raise OptionError(
            "--batch is 1; an export for any batch size needs an example of at least 2. Add --fixed-batch "
            "or use --batch 2."
        )
    with step(f"Exporting to {form}", arguments):
        source, model = build(arguments.model, arguments)
        error = export(
            model,
            inputs_for(source, model, arguments),
            arguments.out,
            form,
            dynamic=not arguments.fixed_batch,
        )
    size = arguments.out.stat().st_size
    if arguments.json:
        write_json({"file": str(arguments.out), "form": form, "bytes": size, "error": error})
    else:
        Console().print(
            f"Wrote {arguments.out} ({form}, {size:,} bytes); relative error to the model: {error:.1e}",
            highlight=False,
        )
    return 0


def export(model: Any, dummy: Any, file: Path, form: str, *, dynamic: bool = True) -> float:
    """Export a model and compare what was written with it.

    Args:
        model: in eval mode.
        dummy: inputs, in the form of a dummy input, with a batch of at least 2 if `dynamic`.
        file: where to write.
        form: `"onnx"`, `"program"` or `"torchscript"`.
        dynamic: take any batch size.

    Returns:
        The largest relative L2 error of an output, on other inputs (and, if `dynamic`, another batch size).

    Raises:
        MissingExtraError: ONNX is asked for and its packages are not installed.
    """
    import torch

    from maskprop.graph.structure import tensors_in
    from maskprop.graph.trace import split_inputs
    from maskprop.rewrite.verify import fresh_inputs, run_model

    inputs = split_inputs(dummy)
    with torch.random.fork_rng(devices=[]):  # the ONNX exporter draws random numbers
        run = {"onnx": _onnx, "program": _program, "torchscript": _torchscript}[form](model, inputs, file, dynamic)
    other = fresh_inputs(inputs, torch.Generator().manual_seed(1))
    if dynamic and form != "torchscript":
        other = _longer(other)
    expected = [t for _, t in run_model(model, other)]
    actual = [t for _, t in tensors_in(run(other))]
    return max((_distance(a, e) for a, e in zip(actual, expected, strict=True)), default=0.0)


def _shapes(inputs: Any, dynamic: bool) -> Any:
    """The first axis of every input is free."""
    import torch

    from maskprop.graph.structure import map_tensors

    if not dynamic:
        return None
    batch = torch.export.Dim("batch", min=1)
    args, kwargs = map_tensors(inputs, lambda t: {0: batch} if t.dim() else None)
    return args, kwargs


def _program(model: Any, inputs: Any, file: Path, dynamic: bool) -> Any:
    import torch

    shapes = _shapes(inputs, dynamic)
    merged = None if shapes is None else _by_name(model, shapes)
    program = torch.export.export(model, inputs[0], inputs[1], dynamic_shapes=merged)
    torch.export.save(program, file)
    module = torch.export.load(file).module()
    return lambda other: module(*other[0], **other[1])


def _onnx(model: Any, inputs: Any, file: Path, dynamic: bool) -> Any:
    import torch

    from maskprop._extras import require
    from maskprop.graph.structure import tensors_in

    for package in ("onnx", "onnxscript"):
        require(package, "onnx", "maskprop export")
    runtime = require("onnxruntime", "onnx", "maskprop export")
    shapes = _shapes(inputs, dynamic)
    merged = None if shapes is None else _by_name(model, shapes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch's exporter warns of its own calls
        torch.onnx.export(
            model,
            inputs[0],
            file,
            kwargs=inputs[1],
            dynamo=True,
            dynamic_shapes=merged,
            verbose=False,
            external_data=False,
        )
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(other: Any) -> list[torch.Tensor]:
        values = [t.numpy() for _, t in tensors_in(other)]
        return [torch.from_numpy(v) for v in session.run(None, dict(zip(names, values, strict=True)))]

    return run


def _torchscript(model: Any, inputs: Any, file: Path, dynamic: bool) -> Any:
    import torch

    args, kwargs = inputs
    with torch.no_grad():
        if kwargs:
            traced = torch.jit.trace(model, example_kwarg_inputs=kwargs, strict=False)
        else:
            traced = torch.jit.trace(model, args, strict=False)
    torch.jit.save(traced, str(file))
    module = torch.jit.load(str(file))
    return lambda other: module(*other[0], **other[1])


def _by_name(model: Any, shapes: Any) -> dict[str, Any]:
    """Positional and keyword shapes under the names of the parameters of `forward`."""
    import inspect

    args, kwargs = shapes
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _longer(inputs: Any) -> Any:
    """The same inputs with another batch size."""
    import torch

    from maskprop.graph.structure import map_tensors

    return map_tensors(inputs, lambda t: torch.cat([t, t[:1]]) if t.dim() else t)


def _distance(actual: Any, expected: Any) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm()) / (float(expected.norm()) or 1.0)


COMMAND = Command(
    "export",
    "Write a model as ONNX, an exported program or TorchScript, and compare it.",
    add_arguments,
    run,
    "  maskprop export saved:small --out small.onnx\n  maskprop export model.py:build --input 1,28,28 --out small.pt2",
)
