"""``docs/benchmarks.md`` out of the results of the benchmarks, whichever there are.

python -m benchmarks.page
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

INTRODUCTION = """# Benchmarks

What a speedup costs, how that grows, and how fast its models are. The page is written by `python -m benchmarks.page`
from the JSON in [benchmarks/results](../benchmarks/results); each script below measures anew and writes it again.

| script | measures | quick look, on a laptop |
|---|---|---|
| `python -m benchmarks.engine` | seconds and memory of a speedup, by stage, beside other tools | `--quick` |
| `python -m benchmarks.scaling` | how they grow with depth, width and masked layers | `--quick` |
| `python -m benchmarks.latency` | dense, compact and natively thin models, on the CPU and on a GPU | `--quick` |
| `python -m benchmarks.counters` | what a speedup does, in numbers that no machine changes | |

Everything that is compared takes turns in one process, so that a machine that slows down slows all of it; shown are
medians. Of times that were taken on a loaded machine only the ratios mean something; the load stands beside each.
"""


def write(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Write the page and its plots."""
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.md").write_text("\n".join(_page(results, docs)).rstrip() + "\n")


def _page(results: Path, docs: Path) -> Iterator[str]:
    from . import engine_table, latency_table, scaling

    yield INTRODUCTION
    yield "## What a speedup costs"
    yield ""
    found = _read(results / "engine.json")
    if found is None:
        yield from _missing("engine")
    else:
        yield from engine_table.section(found)
    yield "## How the cost grows"
    yield ""
    found = _read(results / "scaling.json")
    if found is None:
        yield from _missing("scaling")
    else:
        scaling.draw(found, docs / "scaling.png")
        yield from scaling.page(found, plot=True)
    yield "## How fast the models are"
    yield ""
    found = _read(results / "latency.json")
    if found is None:
        yield from _missing("latency")
        return
    devices = {row["device"] for row in found["rows"] if "device" in row}
    if "cuda" not in devices:
        yield "No GPU was to be had when this was measured: these are times on a CPU. With one, the script takes it."
        yield ""
    for machine in found["machines"].values():
        yield latency_table.sentence_of(machine)
        yield ""
    if latency_table.draw(found, docs / "latency.png"):
        yield "![Speedup against the FLOPs ratio](latency.png)"
        yield ""
    yield from latency_table.tables(found)


def _missing(name: str) -> Iterator[str]:
    yield f"Not measured yet: run `python -m benchmarks.{name}`."
    yield ""


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    write()
