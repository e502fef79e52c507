"""Torch-Pruning over the zoos, and maskprop on the units that it removed.

    pip install --no-deps torch-pruning==1.6.1
    python -m benchmarks.zoo_peer                          # everything, resuming what an earlier run left
    python -m benchmarks.zoo_peer --zoo timm --models 'vit*'
    python -m benchmarks.coverage --table-only             # writes the section of docs/coverage.md

Torch-Pruning halves every group by L1 norm. It is asked as it is by default, told of nothing but the last layer. Where
that ends, but not with a model that computes what the masked one does, and heads are found, it is asked again: told of
the heads, and to leave the axes of layer norms alone. What it removed becomes masks for the dense model, which
maskprop speeds up. Each model runs in a process of its own; rows are appended to
``benchmarks/results/zoo_peer.jsonl`` as they come.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from .coverage import ZOOS, limit_memory, load_zoo
from .torch_pruning_peer import History, has_heads, masks_of, prune_by_default, prune_told
from .zoo.check import check_specimen, count_parameters, masked_reference, relative_error
from .zoo.randomise import randomise
from .zoo.specimen import Specimen, call
from .zoo_peer_table import RESULTS, Row, read

ROOT = Path(__file__).resolve().parent.parent
RATIO = 0.5
TOLERANCE = 1e-4
Prune = Callable[[nn.Module], History]


# --- the worker: one model, one process -------------------------------------------------------------------


def work(zoo: str, name: str, seconds: float) -> None:
    """One model; says a JSON line when Torch-Pruning is done with it, and another one when maskprop is."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    specimen = load_zoo(zoo)[name]
    torch.manual_seed(0)
    model = randomise(specimen.build().eval(), specimen.inputs())
    inputs = specimen.inputs()

    def default(pruned: nn.Module) -> History:
        return prune_by_default(pruned, inputs, RATIO, seconds=seconds)

    def told(pruned: nn.Module) -> History:
        return prune_told(pruned, inputs, RATIO, heads=True, layer_norms=False, seconds=seconds)

    rows = list(compare(specimen, model, "default", default))
    if rows[0]["theirs"] not in ("right", "timeout") and has_heads(model):
        list(compare(specimen, model, "told", told))


def compare(specimen: Specimen, model: nn.Module, asked: str, prune: Prune) -> Iterator[Row]:
    """Theirs, then ours beside it."""
    row = {"asked": asked, "before": count_parameters(model)}
    pruned = copy.deepcopy(model)
    say({**row, "theirs": "fails", "why": "the process died"})  # what stands if it does
    try:
        history = prune(pruned)
    except BaseException as error:
        row |= {"theirs": "timeout" if isinstance(error, TimeoutError) else "fails", "why": _text(error)}
        yield say(row)
        return
    row |= {"theirs": "unread", "parameters": count_parameters(pruned)}
    if row["parameters"] == row["before"]:
        yield say({**row, "theirs": "nothing"})
        return
    try:
        masks = masks_of(model, specimen.inputs(), history)
    except Exception as error:
        yield say({**row, "why": _text(error)})
        return
    reference = masked_reference(model, masks)
    try:
        with torch.no_grad():
            pairs = [(call(pruned, x), call(reference, x)) for x in specimen.fresh_inputs()]
        error = max(relative_error(a, b) for a, b in pairs)
        row["theirs"] = "right" if error <= TOLERANCE else "wrong"
        row |= {"error": error} if math.isfinite(error) else {"why": "outputs of another shape, or not finite"}
    except Exception as error:
        row |= {"theirs": "breaks", "why": _text(error)}
    yield say(row)
    del pruned, reference
    result = check_specimen(specimen, copy.deepcopy(model), masks)
    yield say({**row, "ours": result.outcome, "after": result.after, "ours_error": result.error, "how": result.how})


def say(row: Row) -> Row:
    """One JSON line to the parent."""
    print("ROW " + json.dumps(row), flush=True)
    return row


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


# --- the parent -------------------------------------------------------------------------------------------


def measure(zoo: str, name: str, seconds: float, memory_gb: float) -> list[Row]:
    """Run one worker; the newest row of each way of asking, as far as it came.

    Args:
        zoo, name: of the model.
        seconds: of processor time for Torch-Pruning; the process may take 25 times that on the clock.
        memory_gb: that the process may take.
    """
    command = [sys.executable, "-m", "benchmarks.zoo_peer", "--worker", zoo, name]
    command += ["--seconds", str(seconds), "--memory-gb", str(memory_gb)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=25 * seconds)
        output, outcome, status = done.stdout, "fails", f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        outcome, status = "timeout", f"more than {25 * seconds:g} s"
    found: dict[str, Row] = {}
    for line in output.splitlines():
        if line.startswith("ROW "):
            row = json.loads(line.removeprefix("ROW "))
            found[row["asked"]] = {"zoo": zoo, "model": name, **row}
    rows = list(found.values()) or [{"zoo": zoo, "model": name, "asked": "default", "theirs": "unbuilt", "why": status}]
    if rows[-1].get("why") == "the process died":
        rows[-1] |= {"theirs": outcome, "why": status}
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", nargs="+", default=list(ZOOS), choices=ZOOS)
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--seconds", type=float, default=40, help="of processor time for Torch-Pruning on a model")
    parser.add_argument("--memory-gb", type=float, default=8)
    parser.add_argument("--redo", action="store_true", help="run again what the results hold")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        limit_memory(arguments.memory_gb)
        work(*arguments.worker, arguments.seconds)
        return
    done = set() if arguments.redo else {(row["zoo"], row["model"]) for row in read(arguments.results)}
    models = [
        (zoo, name)
        for zoo in arguments.zoo
        for glob in arguments.models
        for name in fnmatch.filter(load_zoo(zoo), glob)
        if (zoo, name) not in done
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("peer", total=len(models))
        for zoo, name in models:
            progress.update(task, description=name)
            rows = measure(zoo, name, arguments.seconds, arguments.memory_gb)
            with arguments.results.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            progress.advance(task)


if __name__ == "__main__":
    main()
