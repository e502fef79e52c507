"""Coverage: every model of the zoos under every masking, exact or plainly refused.

    python -m benchmarks.coverage                         # everything, resuming what an earlier run left
    python -m benchmarks.coverage --zoo timm --models 'vit*' 'swin*' --maskings heads mlp
    python -m benchmarks.coverage --redo failed           # run again what was not exact
    python -m benchmarks.coverage --table-only            # write docs/coverage.md from the results

Each model runs in a process of its own, under a limit of time for each masking and of memory. Results are
appended to a file of JSON lines for each zoo as they come, so that a run can be stopped and resumed at any time, and
so that several machines can share the work; the page is written from all files in the folder.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from . import zoo_peer_table
from .coverage_table import write_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage"
TABLE = ROOT / "docs" / "coverage.md"
ZOOS = ("torchvision", "timm", "hf")
Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What one process may take."""

    seconds: float
    memory_gb: float
    threads: int


def load_zoo(name: str) -> Any:
    """A zoo by name; imported on demand, since each pulls in a library."""
    if name == "handmade":
        from .zoo.handmade import HANDMADE

        return HANDMADE
    if name == "torchvision":
        from .zoo.torchvision_zoo import TORCHVISION

        return TORCHVISION
    if name == "timm":
        from .zoo.timm_zoo import TIMM

        return TIMM
    from .zoo.hf_zoo import HF

    return HF


# --- the worker: one model, one process -------------------------------------------------------------------


def work(zoo: str, name: str, maskings: list[str] | None, skip: list[str], memory_gb: float) -> None:
    """Runs one model under its maskings; prints a JSON line before and after each."""
    limit_memory(memory_gb)
    import copy

    import torch

    from .zoo.check import check_specimen
    from .zoo.maskings import make_masks
    from .zoo.randomise import randomise

    say({"start": "build"})
    specimen = load_zoo(zoo)[name]
    torch.manual_seed(0)
    try:
        model = specimen.build().eval()
        randomise(model, specimen.inputs())
        masks = make_masks(model, specimen.inputs(), maskings)
    except Exception as error:
        say({"masking": "build", "outcome": "unbuilt", "detail": f"{type(error).__name__}: {error}"})
        return
    for masking in list(masks):
        if masking not in skip:
            say({"start": masking})
            result = check_specimen(specimen, copy.deepcopy(model), masks[masking])
            say({"masking": masking, **asdict(result)})
        del masks[masking]


def say(line: Row) -> None:
    """One JSON line to the parent."""
    print(json.dumps(line), flush=True)


def limit_memory(gigabytes: float) -> None:
    """Lets this process fail where it would take more."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    size = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


# --- the parent -------------------------------------------------------------------------------------------


def run_model(zoo: str, name: str, maskings: list[str] | None, skip: list[str], limits: Limits) -> Iterator[Row]:
    """Runs one model in a process, and in another one for what is left where a masking took too long."""
    skip = list(skip)
    while True:
        stuck = None
        for row in _run_process(zoo, name, maskings, skip, limits):
            if row["outcome"] in ("timeout", "died"):
                stuck = row["masking"]
            skip.append(row["masking"])
            yield {"zoo": zoo, "model": name, **row}
        if stuck is None or stuck == "build":
            return


def _run_process(zoo: str, name: str, maskings: list[str] | None, skip: list[str], limits: Limits) -> Iterator[Row]:
    command = [sys.executable, "-m", "benchmarks.coverage", "--worker", zoo, name]
    command += ["--memory-gb", str(limits.memory_gb), "--skip", *skip]
    if maskings is not None:
        command += ["--maskings", *maskings]
    environment = {**os.environ, "OMP_NUM_THREADS": str(limits.threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    threading.Thread(target=lambda: _drain(process.stdout, lines), daemon=True).start()
    threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True).start()
    current = "build"
    try:
        while (line := lines.get(timeout=limits.seconds)) is not None:
            if not line.startswith("{"):
                continue  # a library that prints
            row = json.loads(line)
            if "start" in row:
                current = row["start"]
            else:
                current = ""
                yield row
    except queue.Empty:
        yield {"masking": current, "outcome": "timeout", "detail": f"more than {limits.seconds:g} s"}
        return
    finally:
        process.kill()
        process.wait()
    if current not in ("", "build") or (process.returncode and current == "build"):
        detail = f"exit status {process.returncode}; {''.join(errors[-3:]).strip()}"
        yield {"masking": current, "outcome": "died", "detail": detail}


def _drain(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def read_results(folder: Path) -> dict[tuple[str, str, str], Row]:
    """The newest row of each zoo, model and masking in any of a folder's files; later ones in a file are newer."""
    rows = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["zoo"], row["model"], row["masking"]] = row
    return rows


def run(
    zoos: list[str],
    globs: list[str],
    maskings: list[str] | None,
    redo: str,
    jobs: int,
    limits: Limits,
    folder: Path,
) -> None:
    """Runs what the results do not hold yet, and appends it to the files of their zoos."""
    done = read_results(folder)
    keep = {key for key, row in done.items() if redo == "none" or (redo == "failed" and row["outcome"] == "exact")}
    finished = {(zoo, model) for zoo, model, masking in keep if masking == "done"}
    models = [
        (zoo, name) for zoo in zoos for name in load_zoo(zoo) if any(fnmatch.fnmatch(name, glob) for glob in globs)
    ]
    if redo == "none":
        models = [key for key in models if key not in finished]
    folder.mkdir(parents=True, exist_ok=True)
    tally: Counter[str] = Counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        task = progress.add_task("coverage", total=len(models))
        lock = threading.Lock()

        def store(row: Row) -> None:
            with lock:
                with (folder / f"{row['zoo']}.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                if row["masking"] != "done":
                    tally[row["outcome"]] += 1
                    _announce(row, progress.console)

        def one(key: tuple[str, str]) -> str:
            skip = [masking for zoo, model, masking in keep if (zoo, model) == key and masking != "done"]
            for row in run_model(*key, maskings, skip, limits):
                store(row)
            if maskings is None:
                store({"zoo": key[0], "model": key[1], "masking": "done", "outcome": "exact"})
            return key[1]

        for future in as_completed([pool.submit(one, key) for key in models]):
            summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tally.items()))
            progress.update(task, advance=1, description=f"{future.result()}: {summary}")


def _announce(row: Row, console: Console) -> None:
    """One line about whatever is not exact; a silent mismatch is loud."""
    text = f"{row['zoo']}/{row['model']} {row['masking']}: {row.get('detail', '')[:200]}"
    if row["outcome"] == "mismatch":
        console.print(Text.assemble(("SILENT MISMATCH", "bold white on red"), " ", text))
    elif row["outcome"] != "exact":
        console.print(Text(f"{row['outcome']:9}{text}"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", nargs="+", default=list(ZOOS), choices=(*ZOOS, "handmade"))
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--maskings", nargs="+", metavar="NAME")
    parser.add_argument("--redo", choices=("none", "failed", "all"), default="none")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--timeout", type=float, default=300, help="seconds a masking")
    parser.add_argument("--memory-gb", type=float, default=12)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder of JSON lines")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--skip", nargs="*", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker, arguments.maskings, arguments.skip, arguments.memory_gb)
        return
    if not arguments.table_only:
        threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
        limits = Limits(arguments.timeout, arguments.memory_gb, threads)
        run(
            arguments.zoo,
            arguments.models,
            arguments.maskings,
            arguments.redo,
            arguments.jobs,
            limits,
            arguments.results,
        )
    rows = list(read_results(arguments.results).values())
    peer = zoo_peer_table.section(zoo_peer_table.read())
    write_table(rows, arguments.table, {zoo: len(load_zoo(zoo)) for zoo in ZOOS}, peer)


if __name__ == "__main__":
    main()
