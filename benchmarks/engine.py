"""What a speedup costs: seconds cold and warm, by stage, and memory, beside two limits and two other tools.

    python -m benchmarks.engine                    # everything; writes the JSON and docs/benchmarks.md
    python -m benchmarks.engine --quick            # three models, two rounds, under two minutes
    python -m benchmarks.engine --ratio            # one number: ResNet-50's speedup in dense forward passes
    python -m benchmarks.engine --table-only       # docs/benchmarks.md from the JSON

The limits are one dense forward pass at batch 1 and one copy of the parameters. The other tools are Torch-Pruning
1.6.1 (building its graph and one step that halves every group) and torch-simplify 1.1.4, where they are installed:

    pip install --no-deps torch-pruning==1.6.1 torch-simplify==1.1.4

Each model runs in a process of its own, and in another one for memory. Within a process everything takes turns, so
that a machine that slows down slows all of it; what is shown is the median. Models are copied outside of the clock.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from . import page
from .engine_table import section
from .machine import EXACT_MEMORY, describe, peak_memory, version_of
from .subjects import SUBJECTS, Subject

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "engine.json"
QUICK = ("ResNet-18", "MobileNetV2", "BERT-base")
PEERS = {"Torch-Pruning": "torch-pruning", "torch-simplify": "torch-simplify"}
PEER_LIMIT = 120  # seconds
MOST_TURNS = 40
Row = dict[str, Any]


# --- what is measured -------------------------------------------------------------------------------------


def by_torch_pruning(model: nn.Module, subject: Subject) -> None:
    """Build and step, with half of every group to go."""
    import torch_pruning as tp

    heads = {} if subject.heads is None else subject.heads.by_layer(model)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    pruner = tp.pruner.MetaPruner(
        model,
        subject.inputs(),
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=last,
        num_heads=heads,
        prune_num_heads=bool(heads),
    )
    pruner.step()


def by_simplify(model: nn.Module, subject: Subject) -> None:
    """Of a model whose masked weights are zero already."""
    from simplify import simplify

    inputs = subject.inputs()
    if not isinstance(inputs, torch.Tensor):
        raise TypeError("it takes one tensor as the input")
    simplify(model, torch.zeros_like(inputs))


def forward(model: nn.Module, subject: Subject) -> None:
    """One dense pass at batch 1."""
    inputs = subject.inputs()
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)


def timed(run: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Wall-clock seconds of one call, and its result; what others left is collected before."""
    gc.collect()
    start = time.perf_counter()
    result = run(*args)
    return time.perf_counter() - start, result


@contextmanager
def limited() -> Iterator[None]:
    """End another tool's run that takes too long: on Torch-Pruning and Swin-T nobody has waited for the end."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {PEER_LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PEER_LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def copy_parameters(model: nn.Module) -> list[torch.Tensor]:
    """One copy of the parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


RUN_PEER: dict[str, Callable[[nn.Module, Subject], None]] = {
    "Torch-Pruning": by_torch_pruning,
    "torch-simplify": by_simplify,
}


# --- the worker: one model, one process -------------------------------------------------------------------


class Worker:
    """Measures one model in this process."""

    def __init__(self, name: str) -> None:
        self.subject = SUBJECTS[name]
        self.model = self.subject.build()
        self.masks = self.subject.masks(self.model)
        self.row: Row = {"parameters": {"before": count(self.model)}, "peers": {}}

    def copied(self, masked: bool = False) -> nn.Module:
        """A model to work on."""
        model = copy.deepcopy(self.model)
        if masked:
            with torch.no_grad():
                for name, mask in self.masks.items():
                    model.get_parameter(name).mul_(mask)
        return model

    def times(self, rounds: int, seconds: float = 0.0) -> Row:
        """Cold, then everything in turns: at least so many, and for so long, since short times vary more."""
        self.row["cold"], _ = timed(self.speedup, self.copied(), False)
        found: dict[str, list[float]] = defaultdict(list)
        stages: dict[str, list[float]] = defaultdict(list)
        peers = {name: run for name, run in RUN_PEER.items() if version_of(PEERS[name])}
        start = time.perf_counter()
        while (turns := len(found["warm"])) < rounds or (turns < MOST_TURNS and time.perf_counter() - start < seconds):
            forward(self.model, self.subject)  # warms up what the other tools have cooled down
            found["forward"].append(timed(forward, self.model, self.subject)[0])
            found["copy"].append(timed(copy_parameters, self.model)[0])
            for key, verify in (("warm", False), ("verified", True)):
                taken, speedup = timed(self.speedup, self.copied(), verify)
                found[key].append(taken)
                self._note(speedup)
                if not verify:
                    for stage, part in speedup.report.seconds.items():
                        stages[stage].append(part)
                del speedup
            for name in list(peers):
                model = self.copied(masked=True)
                try:
                    with limited():
                        found[name].append(timed(peers[name], model, self.subject)[0])
                    self.row["peers"][name] = {"parameters": count(model)}
                except Exception as error:  # whatever it fails with belongs in the table
                    self.row["peers"][name] = {"failure": f"{type(error).__name__}: {error}"[:300]}
                    del peers[name]
        for key, values in found.items():
            if key not in PEERS:
                self.row[key] = statistics.median(values)
            elif key in peers:
                self.row["peers"][key]["seconds"] = statistics.median(values)
        self.row["turns"] = len(found["warm"])
        self.row["stages"] = {stage: statistics.median(values) for stage, values in stages.items()}
        return self.row

    def memory(self) -> Row:
        """Peaks over what the dense model takes, each after a first run that loads code."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        row: Row = {"bytes": weights, "peers": {}}
        for key, verify in (("peak", False), ("verified", True)):
            self.speedup(self.copied(), verify)
            _, row[key] = peak_memory(self.speedup, self.copied(), verify)
        for name, run in RUN_PEER.items():
            with suppress(Exception), limited():  # told by the process that takes the time
                run(self.copied(masked=True), self.subject)
                _, row["peers"][name] = peak_memory(run, self.copied(masked=True), self.subject)
        return row

    def speedup(self, model: nn.Module, verify: bool) -> Any:
        """A speedup of this model, done."""
        from maskprop import ModelSpeedup

        speedup = ModelSpeedup(model, self.subject.inputs(), self.masks, verify=verify)
        speedup.speedup_model()
        return speedup

    def _note(self, speedup: Any) -> None:
        report = speedup.report
        self.row["parameters"]["after"] = report.parameters[1]
        self.row |= {
            "nodes": len(speedup.graph.nodes),
            "solves": report.solves,
            "pinned": len(report.repair.pinned),
        }
        if report.check is not None:
            self.row["error"] = report.check.error


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def work(name: str, what: str, arguments: argparse.Namespace) -> None:
    """One model, told to the parent as a line of JSON."""
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    worker = Worker(name)
    found = worker.memory() if what == "memory" else worker.times(arguments.rounds, arguments.seconds)
    print("RESULT " + json.dumps(found), flush=True)


# --- the parent -------------------------------------------------------------------------------------------


def measure(name: str, what: str, arguments: argparse.Namespace) -> Row:
    """Run one worker; what it says, or why it failed."""
    command = [sys.executable, "-m", "benchmarks.engine", "--worker", name, what]
    command += [f"--{key}={getattr(arguments, key)}" for key in ("rounds", "seconds", "threads")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(EXACT_MEMORY if what == "memory" else {})}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            row: Row = json.loads(line.removeprefix("RESULT "))
            return row
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"failure": f"exit status {done.returncode}: {last}"[:300]}


def run(names: list[str], arguments: argparse.Namespace, path: Path | None) -> Row:
    """Every model, time and memory; written after each, so that nothing is lost."""
    torch.set_num_threads(arguments.threads)
    versions = {name: version_of(distribution) for name, distribution in PEERS.items()}
    results: Row = {"machine": describe(), "peers": versions, "rounds": arguments.rounds, "models": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    kinds = ("times",) if arguments.no_memory else ("times", "memory")
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("engine", total=len(names) * len(kinds))
        for name in names:
            row: Row = {}
            for kind in kinds:
                progress.update(task, description=f"{name}: {kind}")
                found = measure(name, kind, arguments)
                row = {**found, **row} if kind == "times" else {**row, "memory": found}
                progress.advance(task)
            if "failure" in row:
                progress.console.print(f"{name} failed: {row['failure']}", markup=False)
            results["models"][name] = row
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def ratio(threads: int, rounds: int) -> str:
    """How many dense batch-1 forward passes a speedup of ResNet-50 costs."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    row = Worker("ResNet-50").times(rounds)
    return (
        f"ResNet-50, {threads} threads: speedup {row['warm']:.3f} s ({row['verified']:.3f} s with verification), "
        f"forward {row['forward']:.3f} s, ratio {row['warm'] / row['forward']:.2f} "
        f"({row['verified'] / row['forward']:.2f})"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, metavar="MODEL", help=", ".join(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=7, help="turns that each tool has (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="of turns at least (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="three models, two rounds, time alone")
    parser.add_argument("--ratio", action="store_true", help="print ResNet-50's ratio and stop")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker, arguments)
        return
    if arguments.ratio:
        print(ratio(arguments.threads, arguments.rounds))
        return
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.no_memory = 2, 0, True
    whole = not (arguments.quick or arguments.models)
    if arguments.table_only:
        page.write()
        return
    path = arguments.results or (RESULTS if whole else None)
    results = run(arguments.models or list(QUICK if arguments.quick else SUBJECTS), arguments, path)
    if path == RESULTS:
        page.write()
    else:
        print("\n".join(section(results)))


if __name__ == "__main__":
    main()
