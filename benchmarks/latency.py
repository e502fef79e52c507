"""How fast the models are that a speedup makes: dense, compact, and natively thin, on the CPU and on a GPU.

    python -m benchmarks.latency                    # what this machine can do in reasonable time
    python -m benchmarks.latency --quick            # two models, the CPU, under two minutes; prints alone
    python -m benchmarks.latency --devices cuda --batches 1 32 256 --modes eager compile --dtypes float32 bfloat16
    python -m benchmarks.latency --models ResNet-50 ViT-B/16 --multiples 1 8 16 64

Half of every coupled group of channels and half of the heads leave (L1 norm, ``maskprop.pruning``); with
``channel_multiple`` of 8, 16 or 64 a few more stay, so that the widths suit the hardware. *Natively thin* is the same
architecture built from new modules at the compact widths: a compact model should be as fast, since it is the same work.
Whether it is, is also told without a clock: by comparing the ATen calls of both. And since a clock tells even two equal
models apart, a second natively thin model, the *control*, shows by how much.

Each model runs in a process of its own. Within a setting (device, mode, dtype, layout, batch) dense, compact, thin and
control take turns, in an order that is drawn anew each time, so that a machine that slows down slows all of them; shown
are medians of the turns and the distance between their quartiles, and of two models the median of their ratios within
the turns, with a 95 % interval of it (McGill, Tukey & Larsen, 1978). GPU times are taken with CUDA events. A run
replaces its own rows in the results and keeps the others, so that a long list can be measured in parts.

Freed memory stays with the process, as in one that serves a model all day. By default the C library hands every large
activation back to the system, whose clearing of new pages then takes most of a CNN's time at larger batches, whatever
the model computes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from . import page
from .clock import clocked, clocks, memory_of, share_of_products
from .latency_table import tables
from .machine import KEPT_MEMORY, describe
from .subjects import SUBJECTS, Subject
from .thin import RATIO, calls, compact, natively_thin

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "latency.json"
QUICK = ("ResNet-18", "MobileNetV2")
FEWEST_TURNS = 5
Row = dict[str, Any]

#: What tells one measurement from another.
KEY = ("model", "kind", "multiple", "device", "mode", "dtype", "layout", "batch")


# --- the inputs -------------------------------------------------------------------------------------------


def batch_of(subject: Subject, size: int, device: str, dtype: torch.dtype, layout: str) -> dict[str, Any]:
    """The subject's sample, ``size`` times, as keyword arguments (a tensor under the name ``""``)."""
    inputs = subject.inputs()
    named = inputs if isinstance(inputs, dict) else {"": inputs}

    def fit(t: Tensor) -> Tensor:
        t = t.repeat(size, *[1] * (t.ndim - 1)).to(device)
        t = t.to(dtype) if t.is_floating_point() else t
        return t.contiguous(memory_format=torch.channels_last) if layout == "channels_last" and t.ndim == 4 else t

    return {name: fit(t) for name, t in named.items()}


def call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """One forward pass."""
    return model(inputs[""]) if "" in inputs else model(**inputs)


def count_flops(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Operations of one pass, attention's products included (fused kernels hide them on the CPU)."""
    fast = torch.backends.mha.get_fastpath_enabled()  # one op that the counter knows nothing of
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


# --- the worker: one model, one process -------------------------------------------------------------------


def work(name: str, options: argparse.Namespace) -> None:
    """Measure one model; every row is told as soon as it is known."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    subject = SUBJECTS[name]
    models: dict[tuple[str, int], nn.Module] = {("dense", 1): subject.build()}
    for multiple in options.multiples:
        models["compact", multiple] = compact(subject, multiple)
        models["thin", multiple] = natively_thin(models["compact", multiple])
    models["control", options.multiples[0]] = natively_thin(models["compact", options.multiples[0]])
    sample = batch_of(subject, 1, "cpu", next(models["dense", 1].parameters()).dtype, "contiguous")
    facts = {
        key: {"flops": count_flops(model, sample), "parameters": sum(p.numel() for p in model.parameters())}
        for key, model in models.items()
    }
    for multiple in options.multiples:
        pair = [calls(lambda m=models[kind, multiple]: call(m, sample)) for kind in ("compact", "thin")]
        facts["compact", multiple] |= {"calls": len(pair[0]), "same_calls": pair[0] == pair[1]}
    for device, dtype, layout in settings(name, options):
        placed = {key: place(model, device, dtype, layout) for key, model in models.items()}
        for mode in options.modes:
            torch._dynamo.reset()
            run = {key: torch.compile(m) if mode == "compile" else m for key, m in placed.items()}
            for batch in options.batches:
                setting = {"device": device, "mode": mode, "dtype": dtype, "layout": layout, "batch": batch}
                for (kind, multiple), row in measure(run, subject, setting, options).items():
                    key = {"model": name, "kind": kind, "multiple": multiple, **setting}
                    print("ROW " + json.dumps({**key, **facts[kind, multiple], **row}), flush=True)


def settings(name: str, options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Device, dtype and memory layout; only images have layouts."""
    images = isinstance(SUBJECTS[name].inputs(), Tensor)
    for device in options.devices:
        for dtype in options.dtypes:
            for layout in options.layouts if images else ["contiguous"]:
                yield device, dtype, layout


def place(model: nn.Module, device: str, dtype: str, layout: str) -> nn.Module:
    """The model where and how it is to run; a copy, if it is not so already."""
    wanted, first = getattr(torch, dtype), next(model.parameters())
    if (first.device.type, first.dtype, "contiguous") == (device, wanted, layout):
        return model
    model = copy.deepcopy(model).to(device=device, dtype=wanted)
    return model.to(memory_format=torch.channels_last) if layout == "channels_last" else model  # type: ignore[call-overload]


def measure(
    models: dict[tuple[str, int], Any], subject: Subject, setting: Row, options: argparse.Namespace
) -> dict[tuple[str, int], Row]:
    """Times of all models in turns, or why a model does not run."""
    device, dtype = setting["device"], getattr(torch, setting["dtype"])
    inputs = batch_of(subject, setting["batch"], device, dtype, setting["layout"])
    run = {key: lambda m=model: call(m, inputs) for key, model in models.items()}
    found: dict[tuple[str, int], Row] = {}
    times: dict[tuple[str, int], list[float]] = {}
    with torch.inference_mode():
        for key, once in run.items():
            try:
                once()
                found[key] = {"memory": memory_of(once, device)}
                if setting["mode"] == "eager":
                    found[key]["products"] = share_of_products(once, device)
                once()
                times[key] = []
            except Exception as error:  # too little memory, no compiler: it belongs in the results
                found[key] = {"failure": f"{type(error).__name__}: {error}"[:300]}
        order, drawn, start = list(times), random.Random(0), time.perf_counter()
        gc.disable()
        for turn in range(options.rounds):
            if turn >= FEWEST_TURNS and time.perf_counter() - start > options.patience:
                break
            drawn.shuffle(order)
            for key in order:
                times[key].append(clocked(run[key], device, options.seconds))
        gc.enable()
    for (kind, multiple), values in times.items():
        row = found[kind, multiple]
        low, middle, high = quartiles(values)
        row |= {"seconds": middle, "spread": (high - low) / middle, "rounds": len(values)}
        row["throughput"] = setting["batch"] / middle
        if kind in ("compact", "control") and ("thin", multiple) in times:
            low, middle, high = quartiles([a / b for a, b in zip(values, times["thin", multiple], strict=True)])
            row |= {"to_thin": middle, "to_thin_error": 1.57 * (high - low) / len(values) ** 0.5}
        if device == "cuda":
            row["clocks"] = clocks()
    return found


def quartiles(values: list[float]) -> list[float]:
    """The three of them."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


# --- the parent -------------------------------------------------------------------------------------------


def collect(name: str, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one model's worker, also of one that did not come to its end."""
    command = [sys.executable, "-m", "benchmarks.latency", "--worker", name]
    for key in ("devices", "modes", "dtypes", "layouts", "batches", "multiples"):
        command += [f"--{key}", *map(str, getattr(options, key))]
    for key in ("threads", "rounds", "seconds", "patience"):
        command += [f"--{key}", str(getattr(options, key))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **KEPT_MEMORY}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=options.timeout
        )
        out, failure = done.stdout, (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else None
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        out, failure = raw.decode() if isinstance(raw, bytes) else raw, f"stopped after {options.timeout} s"
    yield from (json.loads(line.removeprefix("ROW ")) for line in out.splitlines() if line.startswith("ROW "))
    if failure is not None:
        yield {"model": name, "failure": failure[:300]}


def merged(before: Row, rows: list[Row], machine: Row) -> Row:
    """The results with these rows in place of their older selves."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(k) for k in KEY)

    new = {key(row): row for row in rows}
    measured = {row["model"] for row in rows}
    older = [row for row in before.get("rows", []) if key(row) not in new]
    kept = [row for row in older if "kind" in row or row["model"] not in measured]
    machines = {**before.get("machines", {}), machine["name"]: machine}
    return {"ratio": RATIO, "machines": machines, "rows": [*kept, *new.values()]}


def main() -> None:
    """The command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, metavar="MODEL", help=", ".join(SUBJECTS))
    parser.add_argument("--devices", nargs="+", default=["cuda"] if on_gpu else ["cpu"], choices=["cpu", "cuda"])
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compile"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layouts", nargs="+", default=["contiguous"], choices=["contiguous", "channels_last"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256] if on_gpu else [1, 32])
    parser.add_argument("--multiples", nargs="+", type=int, default=[1, 8, 16, 64], help="of channels that stay")
    parser.add_argument("--rounds", type=int, default=25, help="turns that each model has (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.1, help="of a turn (default: %(default)s)")
    parser.add_argument(
        "--patience",
        type=float,
        default=60,
        help=f"seconds of a setting after which {FEWEST_TURNS} turns are enough (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one model (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two models on the CPU, printed alone")
    parser.add_argument("--table-only", action="store_true", help="the page from the JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options)
        return
    if options.table_only:
        page.write()
        return
    if options.quick:
        options.models, options.devices, options.batches = QUICK, ["cpu"], [1, 8]
        options.multiples, options.rounds, options.seconds = [1, 8], 5, 0.05
    torch.set_num_threads(options.threads)
    machine = describe()
    machine["name"] = torch.cuda.get_device_name() if "cuda" in options.devices else machine["processor"]
    if "cuda" in options.devices:
        machine |= {"cuda": torch.version.cuda, "clocks": clocks()}
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        names = options.models or list(SUBJECTS)
        task = progress.add_task("latency", total=len(names))
        for name in names:
            progress.update(task, description=name)
            for row in collect(name, options):
                rows.append({**row, "machine": machine["name"]})
                if "failure" in row:
                    progress.console.print(f"{name} failed: {row['failure']}", markup=False)
            progress.advance(task)
            if not options.quick:  # so that nothing is lost
                before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                RESULTS.write_text(json.dumps(merged(before, rows, machine), indent=1) + "\n")
    if options.quick:
        print("\n".join(tables(merged({}, rows, machine))))
    else:
        page.write()


if __name__ == "__main__":
    main()
