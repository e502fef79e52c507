"""How time and memory grow with depth, width and the number of masked layers, and a Llama-70B planned on meta.

    python -m benchmarks.scaling                   # writes the JSON and docs/benchmarks.md
    python -m benchmarks.scaling --quick           # small sizes, printed alone
    python -m benchmarks.scaling --only llama      # depth, width, masked or llama

Every size runs in two processes of its own, one for time and one for memory, after a small speedup that loads code.
The exponent is the slope of a line through the logarithms: 1 means that twice the layers take twice the time. A fixed
cost makes it smaller, so that of the two largest sizes is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from . import page as pages
from .machine import EXACT_MEMORY, describe, peak_memory, sentence
from .subjects import LLAMA_70B, half, llama, llama_masks, rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
Row = dict[str, Any]
Masks = dict[str, Tensor]


# --- the families -----------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Residual blocks of a convolution and a batch norm, of which every second is wider inside."""

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1)
            )
            for _ in range(depth // 2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def chain(depth: int, masked: int | None = None) -> tuple[nn.Module, Any, Masks]:
    """A chain of ``depth`` convolutions, with half of the channels inside of ``masked`` blocks (all) pruned."""
    model = Chain(depth).eval()
    masks: Masks = {}
    for i in range(len(model.blocks) if masked is None else masked):
        name = f"blocks.{i}.0"
        masks |= rows(name, model.get_submodule(name), half(16))
    return model, torch.randn(1, 3, 8, 8), masks


def wide(width: int) -> tuple[nn.Module, Any, Masks]:
    """Four linear layers of ``width * width`` masked weights each, element by element."""
    layers = [nn.Linear(width, width) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).eval()
    masks = {}
    for i in range(len(layers)):
        masks[f"{i}.weight"] = half(width)[:, None].expand(width, width).clone()
        masks[f"{i}.bias"] = half(width)
    return model, torch.randn(1, width), masks


def llama_70b(size: int) -> tuple[nn.Module, Any, Masks]:
    """Shaped like Llama-70B, on the meta device: nothing holds values but the masks of rows."""
    with torch.device("meta"):
        model = llama(**{**LLAMA_70B, "layers": size})
    return model, {"input_ids": torch.zeros(1, 128, dtype=torch.int64)}, llama_masks(model)


Family = Callable[[int], tuple[nn.Module, Any, Masks]]
FAMILIES: dict[str, tuple[Family, list[int], list[int], str]] = {
    "depth": (chain, [10, 30, 100, 300, 1000], [10, 30, 100], "convolutions"),
    "width": (wide, [256, 512, 1024, 2048, 4096], [256, 512, 1024], "units a layer"),
    "masked": (lambda n: chain(400, n), [1, 10, 50, 100, 200], [1, 10, 50], "masked layers of 400"),
    "llama": (llama_70b, [10, 20, 40, 80], [1, 2], "layers of Llama-70B on meta"),
}


# --- the worker: one size, one process --------------------------------------------------------------------


def work(family: str, size: int, threads: int) -> None:
    """One size, told to the parent as a line of JSON."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    make, _, sizes, _ = FAMILIES[family]
    speed_up = plan if family == "llama" else whole
    speed_up(*make(sizes[0]))
    model, inputs, masks = make(size)
    before = sum(parameter.numel() for parameter in model.parameters())
    (speedup, alignment), peak = peak_memory(speed_up, model, inputs, masks)
    result = {
        "size": size,
        "parameters": before,
        "weights": sum(mask.numel() for mask in masks.values()),
        "nodes": len(speedup.graph.nodes),
        "units": alignment.coupling.size,
        "seconds": speedup.report.seconds,
        "total": sum(speedup.report.seconds.values()),
        "bytes": peak,
    }
    print("RESULT " + json.dumps(result), flush=True)


def whole(model: nn.Module, inputs: Any, masks: Masks) -> tuple[Any, Any]:
    """A speedup without verification."""
    from maskprop import ModelSpeedup

    speedup = ModelSpeedup(model, inputs, masks, verify=False)
    speedup.speedup_model()
    return speedup, speedup.alignment


def plan(model: nn.Module, inputs: Any, masks: Masks) -> tuple[Any, Any]:
    """A speedup up to its plan: on meta tensors there is nothing to rewrite."""
    from maskprop import ModelSpeedup
    from maskprop.align.align import align

    speedup = ModelSpeedup(model, inputs, masks)
    speedup.initialize_speedup()
    speedup.infer_modules_masks()
    start = time.perf_counter()
    alignment = align(speedup.inference)
    speedup.report.seconds["align"] = time.perf_counter() - start
    return speedup, alignment


# --- the parent -------------------------------------------------------------------------------------------


def measure(family: str, size: int, threads: int) -> Row:
    """Time in one process; memory, for which small blocks are mapped one by one, in another."""
    row = _worker(family, size, threads, {})
    row["bytes"] = _worker(family, size, threads, EXACT_MEMORY)["bytes"]
    return row


def _worker(family: str, size: int, threads: int, environment: dict[str, str]) -> Row:
    command = [sys.executable, "-m", "benchmarks.scaling", "--worker", family, str(size), "--threads", str(threads)]
    environment = {**os.environ, **environment, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            row: Row = json.loads(line.removeprefix("RESULT "))
            return row
    raise RuntimeError(f"{family} {size}: {done.stderr[-2000:]}")


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def run(families: list[str], quick: bool, threads: int) -> Row:
    """All sizes of the families."""
    torch.set_num_threads(threads)
    results: Row = {"machine": describe(), "families": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        plans = {family: FAMILIES[family][2 if quick else 1] for family in families}
        task = progress.add_task("scaling", total=sum(map(len, plans.values())))
        for family, sizes in plans.items():
            results["families"][family] = []
            for size in sizes:
                progress.update(task, description=f"{family} {size}")
                results["families"][family].append(measure(family, size, threads))
                progress.advance(task)
    return results


# --- the page ---------------------------------------------------------------------------------------------


def page(results: Row, plot: bool) -> Iterator[str]:
    """The lines of the page's part."""
    yield "`python -m benchmarks.scaling` says how everything is measured. Time and memory are those of a whole speedup"
    yield "without verification; of the Llama, of tracing, inference and the plan."
    yield ""
    yield sentence(results["machine"])
    yield ""
    if plot:
        yield "![Seconds against size](scaling.png)"
        yield ""
    for family, found in results["families"].items():
        title = FAMILIES[family][3]
        yield f"### {title[0].upper()}{title[1:]}"
        yield ""
        yield from _exponents(family, found)
        stages = list(found[-1]["seconds"])
        yield _line("size", "graph nodes", "masked weights", "units", *stages, "seconds", "MB")
        yield _line(*["---:"] * (6 + len(stages)))
        for row in found:
            yield _line(
                *(f"{row[key]:,}" for key in ("size", "nodes", "weights", "units")),
                *(f"{row['seconds'].get(stage, 0.0):.3f}" for stage in stages),
                f"{row['total']:.2f}",
                "—" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f}",
            )
        yield ""


def _exponents(family: str, found: list[Row]) -> Iterator[str]:
    against = "weights" if family == "width" else "nodes" if family in ("depth", "llama") else "size"
    what = {"weights": "masked weights", "nodes": "graph nodes", "size": "masked layers"}[against]
    if len(found) < 2:
        return
    for key, title in (("total", "Seconds"), ("bytes", "Bytes")):
        pairs = [(row[against], row[key]) for row in found if row[key]]
        if len(pairs) == len(found):
            sizes, values = (list(column) for column in zip(*pairs, strict=True))
            whole, last = exponent(sizes, values), exponent(sizes[-2:], values[-2:])
            yield f"* {title} grow with the {what} to the power of **{whole:.2f}**; {last:.2f} at the end."
    yield ""


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(results: Row, path: Path) -> None:
    """Seconds against size, one panel a family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    families = results["families"]
    figure, axes = plt.subplots(1, len(families), figsize=(3.2 * len(families), 3), squeeze=False)
    for axis, (family, found) in zip(axes[0], families.items(), strict=True):
        sizes = [row["size"] for row in found]
        for stage in found[-1]["seconds"]:
            axis.plot(sizes, [row["seconds"].get(stage, 0.0) for row in found], marker=".", label=stage)
        axis.plot(sizes, [row["total"] for row in found], color="black", marker="o", label="total")
        axis.set(xscale="log", yscale="log", xlabel=FAMILIES[family][3], title=family)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, help="these families, printed alone")
    parser.add_argument("--quick", action="store_true", help="small sizes, printed alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--table-only", action="store_true", help="page and plot from the JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker[0], int(arguments.worker[1]), arguments.threads)
        return
    if arguments.table_only:
        pages.write()
        return
    results = run(arguments.only or list(FAMILIES), arguments.quick, arguments.threads)
    if arguments.quick or arguments.only:
        print("\n".join(page(results, plot=False)))
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    pages.write()


if __name__ == "__main__":
    main()
