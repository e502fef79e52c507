"""How fast the models are that a speedup makes: dense, compact, and natively thin, on the CPU and on a GPU.

    python -m benchmarks.latency                    # what this machine can do in reasonable time
    python -m benchmarks.latency --quick            # two models, the CPU, under two minutes; prints alone
    python -m benchmarks.latency --devices cuda --batches 1 32 256 --modes eager compile --dtypes float32 bfloat16
    python -m benchmarks.latency --models ResNet-50 ViT-B/16 --multiples 1 8 16 64

Half of every coupled group of channels and half of the heads leave (L1 norm, ``maskprop.pruning``); with
``channel_multiple`` of 8, 16 or 64 a few more stay, so that the widths suit the hardware. *Natively thin* is the same
architecture built from new modules at the compact widths: a compact model should be as fast, since it is the same work.
Whether it is, is also told without a clock: by comparing the ATen calls of both.

Each model runs in a process of its own. Within a setting (device, mode, dtype, layout, batch) dense, compact and thin
take turns, so that a machine that slows down slows all of them; shown are medians of the turns and the distance
between their quartiles. GPU times are taken with CUDA events. A run replaces its own rows in the results and keeps
the others, so that a long list can be measured in parts.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from . import page
from .latency_table import tables
from .machine import describe, peak_memory
from .subjects import SUBJECTS, Subject

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "latency.json"
QUICK = ("ResNet-18", "MobileNetV2")
RATIO = 0.5
Row = dict[str, Any]

#: What tells one measurement from another.
KEY = ("model", "kind", "multiple", "device", "mode", "dtype", "layout", "batch")


# --- the models -------------------------------------------------------------------------------------------


def compact(subject: Subject, multiple: int) -> nn.Module:
    """The model with half of its units gone, in multiples of ``multiple``."""
    from maskprop import ModelSpeedup
    from maskprop.pruning import L1NormPruner

    model = subject.build()
    inputs = subject.inputs()
    masks = L1NormPruner(model, RATIO, dummy_input=inputs, ignore=_heads(model), channel_multiple=multiple).update()
    return ModelSpeedup(model, inputs, masks, channel_multiple=multiple, verify=False).speedup_model()


def _heads(model: nn.Module) -> list[str]:
    """The last layer, whose rows are the classes."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]


def natively_thin(model: nn.Module) -> nn.Module:
    """The same architecture out of new modules of the compact sizes, with the same values."""
    thin = copy.deepcopy(model)
    thin.__dict__.pop("_maskprop_record", None)
    for name, module in list(thin.named_modules()):
        build = next((_BUILD[t] for t in type(module).__mro__ if t in _BUILD and type(module) is t), None)
        if build is None or not name:
            continue
        new = build(module).to(next(module.parameters()))
        new.load_state_dict(module.state_dict())
        parent, _, key = name.rpartition(".")
        setattr(thin.get_submodule(parent), key, new.train(module.training))
    return thin


def _conv(m: Any) -> nn.Module:
    return type(m)(
        m.in_channels,
        m.out_channels,
        m.kernel_size,
        m.stride,
        m.padding,
        dilation=m.dilation,
        groups=m.groups,
        bias=m.bias is not None,
        padding_mode=m.padding_mode,
    )


_BUILD: dict[type, Callable[[Any], nn.Module]] = {
    nn.Linear: lambda m: nn.Linear(m.in_features, m.out_features, m.bias is not None),
    nn.Conv2d: _conv,
    nn.BatchNorm2d: lambda m: nn.BatchNorm2d(m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats),
    nn.LayerNorm: lambda m: nn.LayerNorm(m.normalized_shape, m.eps, m.elementwise_affine, m.bias is not None),
    nn.Embedding: lambda m: nn.Embedding(m.num_embeddings, m.embedding_dim, m.padding_idx),
}


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


class _Calls(TorchDispatchMode):
    """Notes every ATen call: the op, and its arguments; of tensors shape, strides, dtype and alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments, _ = tree_flatten((args, kwargs or {}))
        self.made.append((str(func), [_seen(a) for a in arguments]))
        return func(*args, **(kwargs or {}))


def _seen(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return tuple(value.shape), value.stride(), value.dtype, value.data_ptr() % 64


def calls(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """The ATen calls of one forward pass: where two models make the same ones, a clock cannot tell them apart."""
    with torch.no_grad(), _Calls() as noted:
        call(model, inputs)
    return noted.made


# --- the clock --------------------------------------------------------------------------------------------


def clocked(run: Callable[[], Any], device: str, seconds: float) -> float:
    """Seconds of a call, over about ``seconds`` of calls."""
    once = _elapsed(run, device, 1)
    return _elapsed(run, device, max(1, min(1000, int(seconds / max(once, 1e-6)))))


def _elapsed(run: Callable[[], Any], device: str, times: int) -> float:
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - start) / times
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(times):
        run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / times


def memory_of(run: Callable[[], Any], device: str) -> int | None:
    """Bytes that one call takes at most on top of the model."""
    if device != "cuda":
        return peak_memory(run)[1]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def clocks() -> str | None:
    """Clocks of the GPU as they are now."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


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
    sample = batch_of(subject, 1, "cpu", next(models["dense", 1].parameters()).dtype, "contiguous")
    facts = {
        key: {"flops": count_flops(model, sample), "parameters": sum(p.numel() for p in model.parameters())}
        for key, model in models.items()
    }
    for multiple in options.multiples:
        pair = [calls(models[kind, multiple], sample) for kind in ("compact", "thin")]
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
    """A copy of the model where and how it is to run."""
    model = copy.deepcopy(model).to(device=device, dtype=getattr(torch, dtype))
    return model.to(memory_format=torch.channels_last) if layout == "channels_last" else model  # type: ignore[call-overload]


def measure(
    models: dict[tuple[str, int], Any], subject: Subject, setting: Row, options: argparse.Namespace
) -> dict[tuple[str, int], Row]:
    """Times of all models in turns, or why a model does not run."""
    device, dtype = setting["device"], getattr(torch, setting["dtype"])
    inputs = batch_of(subject, setting["batch"], device, dtype, setting["layout"])
    times: dict[tuple[str, int], list[float]] = {key: [] for key in models}
    found: dict[tuple[str, int], Row] = {}
    with torch.inference_mode():
        for key, model in models.items():
            try:
                for _ in range(3):
                    call(model, inputs)
                found[key] = {"memory": memory_of(lambda m=model: call(m, inputs), device)}
            except Exception as error:  # too little memory, no compiler: it belongs in the results
                found[key] = {"failure": f"{type(error).__name__}: {error}"[:300]}
        gc.disable()
        for turn in range(options.rounds):  # to and fro: who comes behind the dense model has colder caches
            for key, model in list(models.items())[:: -1 if turn % 2 else 1]:
                if "failure" not in found[key]:
                    times[key].append(clocked(lambda m=model: call(m, inputs), device, options.seconds))
        gc.enable()
    for key, values in times.items():
        if values:
            low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
            found[key] |= {"seconds": middle, "spread": (high - low) / middle, "rounds": len(values)}
            found[key]["throughput"] = setting["batch"] / middle
            if device == "cuda":
                found[key]["clocks"] = clocks()
    return found


# --- the parent -------------------------------------------------------------------------------------------


def collect(name: str, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one model's worker, also of one that did not come to its end."""
    command = [sys.executable, "-m", "benchmarks.latency", "--worker", name]
    for key in ("devices", "modes", "dtypes", "layouts", "batches", "multiples"):
        command += [f"--{key}", *map(str, getattr(options, key))]
    for key in ("threads", "rounds", "seconds"):
        command += [f"--{key}", str(getattr(options, key))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
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
    parser.add_argument("--rounds", type=int, default=7, help="turns that each model has (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn (default: %(default)s)")
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
        options.multiples, options.rounds, options.seconds = [1, 8], 3, 0.05
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
