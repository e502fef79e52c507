"""Train a network on digits, prune it, speed it up, put the three models side by side, and train on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from maskprop import measure
from maskprop._extras import require
from maskprop.demo.digits import (
    DigitNet,
    Digits,
    accuracy,
    l1_masks,
    load_digits,
    predict,
    steps_per_epoch,
    train,
    training_loss,
)
from maskprop.speedup import ModelSpeedup


@dataclass(frozen=True)
class Result:
    """One column of the table.

    Attributes:
        accuracy: share of the test images.
        parameters: elements.
        flops: of one image.
        bytes: of the saved `state_dict`.
        latency_1: seconds for one image.
        latency_64: seconds for a batch of 64 images.
        difference: largest absolute difference to an output of the masked model, over the test images.
    """

    accuracy: float
    parameters: int
    flops: int
    bytes: int
    latency_1: float
    latency_64: float
    difference: float


_ROWS: dict[str, Callable[[Result], str]] = {
    "test accuracy": lambda r: f"{r.accuracy:.2%}",
    "parameters": lambda r: f"{r.parameters:,}",
    "FLOPs (batch 1)": lambda r: f"{r.flops / 1e6:.2f} M",
    "file size": lambda r: f"{r.bytes / 1e6:.2f} MB",
    "latency (batch 1)": lambda r: f"{r.latency_1 * 1e3:.2f} ms",
    "latency (batch 64)": lambda r: f"{r.latency_64 * 1e3:.2f} ms",
    "largest output difference to masked": lambda r: f"{r.difference:.1e}",
}


def demo(
    console: Console, out: Path | None, *, sparsity: float, epochs: int, seed: int, progress: bool = True
) -> dict[str, Result]:
    """Run the demo.

    Args:
        console: where the table goes.
        out: an existing directory for the report and a picture of the widths, or `None`.
        sparsity: the share of rows to prune inside the blocks.
        epochs: of training.
        seed: decides the split of the data, the weights and the order of the batches.
        progress: show progress bars.

    Returns:
        The results of the models `dense`, `masked` and `compact`, before the fine-tuning.

    Raises:
        MissingExtraError: scikit-learn, or with `out` matplotlib, is not installed.
    """
    if out is not None:
        require("matplotlib", "report", "maskprop demo --out")
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits(generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = DigitNet()
    with Progress(console=console, disable=not progress) as bars:
        task = bars.add_task("Training", total=epochs * steps_per_epoch(digits))
        train(dense, digits, epochs, generator, lambda: bars.advance(task))

    masks = l1_masks(dense, sparsity)
    masked = apply_masks(copy.deepcopy(dense), masks)
    speedup = ModelSpeedup(copy.deepcopy(dense), digits.test_images[:1], masks)
    compact = speedup.speedup_model()

    results = compare({"dense": dense, "masked": masked, "compact": compact}, digits)
    console.print(table(results))
    if out is not None:
        write(out, speedup, results)
        draw_widths(out / "widths.png", widths(dense), widths(compact))
        console.print(
            f"Wrote report.txt, report.json, table.json and widths.png to {out}",
            highlight=False,
            soft_wrap=True,
        )

    before = training_loss(compact, digits), accuracy(compact, digits)
    with Progress(console=console, disable=not progress) as bars:
        task = bars.add_task("Fine-tuning the compact model", total=steps_per_epoch(digits))
        train(compact, digits, 1, generator, lambda: bars.advance(task), learning_rate=0.005, weight_decay=5e-4)
    after = training_loss(compact, digits), accuracy(compact, digits)
    console.print(
        f"Fine-tuned for one epoch: training loss {before[0]:.4f} -> {after[0]:.4f}, "
        f"test accuracy {before[1]:.2%} -> {after[1]:.2%}",
        soft_wrap=True,
    )
    return results


def apply_masks(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """Multiply the weights of a model by their masks, in place: the masked model, at full size."""
    with torch.no_grad():
        for module, targets in masks.items():
            for name, mask in targets.items():
                model.get_parameter(f"{module}.{name}").mul_(mask)
    return model


def compare(models: Mapping[str, nn.Module], digits: Digits) -> dict[str, Result]:
    """Measure the models, one of which is named `masked`."""
    reference = predict(models["masked"], digits.test_images)
    single = measure.latencies(models, digits.test_images[:1])
    batch = measure.latencies(models, digits.test_images[:64])
    return {
        name: Result(
            accuracy=accuracy(model, digits),
            parameters=measure.count_parameters(model),
            flops=measure.count_flops(model, digits.test_images[:1]),
            bytes=measure.file_size(model),
            latency_1=single[name],
            latency_64=batch[name],
            difference=float((predict(model, digits.test_images) - reference).abs().max()),
        )
        for name, model in models.items()
    }


def table(results: Mapping[str, Result]) -> Table:
    """The results, a column a model."""
    caption = f"latency: median, threads: {torch.get_num_threads()}; the rest over all test images"
    if results["masked"].accuracy < 0.9:
        caption += "\nlow accuracy: trained too briefly, or pruned too far, for norms to tell rows apart; the speedup"
        caption += " changes nothing about that"
    made = Table(title="A residual network on handwritten digits", caption=caption)
    made.add_column("")
    for name in results:
        made.add_column(name, justify="right")
    for title, cell in _ROWS.items():
        made.add_row(title, *map(cell, results.values()))
    return made


def widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution."""
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def write(out: Path, speedup: ModelSpeedup, results: Mapping[str, Result]) -> None:
    """Write the engine's report as text and JSON, and the table as JSON."""
    numbers = {name: asdict(result) for name, result in results.items()}
    (out / "report.txt").write_text(f"{speedup.report}\n", encoding="utf-8")
    (out / "report.json").write_text(json.dumps(speedup.report.to_dict(), indent=2) + "\n", encoding="utf-8")
    (out / "table.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def draw_widths(path: Path, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Draw a bar a convolution: its width before and, within it, what is left."""
    # a Figure of its own needs no display and leaves pyplot's state alone
    figure = require("matplotlib.figure", "report", "draw_widths").Figure(
        figsize=(8, 0.35 * len(before) + 1.2), layout="constrained"
    )
    axes = figure.subplots()
    names = list(before)
    bars = axes.barh(names, [before[name] for name in names], color="0.85", label="before")
    axes.barh(names, [after[name] for name in names], color="tab:blue", height=0.5, label="after")
    axes.bar_label(bars, [f"{before[name]} → {after[name]}" for name in names], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("output channels")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=150)
