"""``docs/benchmarks.md`` out of the results of the benchmarks, whichever there are.

python -m benchmarks.page
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

INTRODUCTION = """# Benchmarks

What a speedup costs, how that grows, and how fast its models are. The page is written by `python -m benchmarks.page`
from the JSON in `benchmarks/results`; each script below measures anew and writes it again.

| script | measures | quick look, on a laptop |
|---|---|---|
| `python -m benchmarks.engine` | seconds and memory of a speedup, by stage, beside other tools | `--quick` |
| `python -m benchmarks.scaling` | how they grow with depth, width and masked layers | `--quick` |
| `python -m benchmarks.latency` | dense, compact and natively thin models, on the CPU and on a GPU | `--quick` |
| `python -m benchmarks.streaming` | a checkpoint larger than the memory it may use, shard by shard | |
| `python -m benchmarks.pruners`, `python -m benchmarks.pruners_peers` | the tables on [pruners](pruners.md) | |
| `maskprop bench MODEL MODEL` | latency of two models of yours, side by side | |
| `python -m benchmarks.counters` | what a speedup does, in numbers that no machine changes | |

Everything that is compared takes turns in one process, so that a machine that slows down slows all of it; shown are
medians. Of times that were taken on a loaded machine only the ratios mean something; the load stands beside each.

What a smaller model gains depends on the machine, the batch and the widths that are left: measure yours with
`maskprop bench`, and prefer widths that are multiples of 8 or more (`channel_multiple`) on a GPU.
"""


def write(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Write the page and its plots."""
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.md").write_text("\n".join(_page(results, docs)).rstrip() + "\n")


def _page(results: Path, docs: Path) -> Iterator[str]:
    yield INTRODUCTION
    for title, name, lines in SECTIONS:
        yield f"## {title}"
        yield ""
        found = _read(results / f"{name}.json")
        if found is not None:
            yield from lines(found, docs)
        else:
            yield f"Not measured yet: run `python -m benchmarks.{name}`."
        yield ""


def _engine(found: Row, docs: Path) -> Iterator[str]:
    from . import engine_table

    yield from engine_table.section(found)


def _scaling(found: Row, docs: Path) -> Iterator[str]:
    from . import scaling

    scaling.draw(found, docs / "scaling.png")
    yield from scaling.page(found, plot=True)


def _latency(found: Row, docs: Path) -> Iterator[str]:
    from . import latency_table

    if "cuda" not in {row["device"] for row in found["rows"] if "device" in row}:
        yield "No GPU was to be had when this was measured: these are times on a CPU. With one, the script takes it."
        yield ""
    for machine in found["machines"].values():
        yield latency_table.sentence_of(machine)
        yield ""
    if latency_table.draw(found, docs / "latency.png"):
        yield "![Speedup against the FLOPs ratio](latency.png)"
        yield ""
    yield from latency_table.tables(found)


SECTIONS: tuple[tuple[str, str, Callable[[Row, Path], Iterator[str]]], ...] = (
    ("What a speedup costs", "engine", _engine),
    ("How the cost grows", "scaling", _scaling),
    ("How fast the models are", "latency", _latency),
)


def _read(path: Path) -> Row | None:
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    write()
