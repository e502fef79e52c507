"""The tables of ``benchmarks.engine``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .machine import sentence
from .subjects import SUBJECTS

Row = dict[str, Any]
DASH = "—"


def section(results: Row) -> Iterator[str]:
    """The lines of the page's part."""
    models = {name: row for name, row in results["models"].items() if "failure" not in row}
    yield "`python -m benchmarks.engine` says how everything is measured; the masks, under which about half of each"
    yield "model leaves, are in `benchmarks/subjects.py`."
    yield ""
    yield sentence(results["machine"])
    yield ""
    yield from _summary(models, results["peers"])
    yield "### Time"
    yield ""
    turns = sorted({row.get("turns", results["rounds"]) for row in models.values()}) or [results["rounds"]]
    several = " to ".join(map(str, dict.fromkeys((turns[0], turns[-1]))))
    yield f"Seconds, medians of {several} turns. *Cold* is the first speedup of a process, which loads code; *warm* a"
    yield "later one; *verified* a warm one that compares its result with the masked model. All others do not."
    yield ""
    yield from _time(models, results["peers"])
    yield "Stages of a warm speedup, in milliseconds:"
    yield ""
    yield from _stages(models)
    memory = {name: row["memory"] for name, row in models.items() if row.get("memory", {}).get("peak")}
    if memory:
        yield "### Memory"
        yield ""
        yield "The most that a warm speedup takes on top of the dense model, in MB and in sizes of its parameters."
        yield ""
        yield from _memory(memory, results["peers"])
    absent = [name for name in SUBJECTS if name not in results["models"]]
    if absent:
        yield f"Not run: {', '.join(absent)}."
        yield ""
    failures = list(_failures(results["models"]))
    if failures:
        yield "### Failures"
        yield ""
        yield from failures


def _summary(models: dict[str, Row], peers: Row) -> Iterator[str]:
    for name, version in peers.items():
        able = {model: row for model, row in models.items() if "seconds" in row["peers"].get(name, {})}
        idle = [model for model, row in able.items() if _left_whole(row, name)]
        shares = {
            model: row["warm"] / row["peers"][name]["seconds"] for model, row in able.items() if model not in idle
        }
        if version is None:
            yield f"* {name} was not installed."
        elif shares:
            mean = math.exp(sum(map(math.log, shares.values())) / len(shares))
            worst = max(shares, key=shares.__getitem__)
            yield (
                f"* A speedup takes **{mean:.2f}** of the time of {name} {version} in the geometric mean over "
                f"the {len(shares)} models that both make smaller; at most {shares[worst]:.2f} ({worst})."
            )
        if idle:
            yield f"  It did not make {', '.join(idle)} smaller, so its time there does not count."
    if "ResNet-50" in models:
        row = models["ResNet-50"]
        yield f"* ResNet-50: **{row['warm'] / row['forward']:.1f}** dense forward passes."
    yield ""


def _left_whole(row: Row, peer: str) -> bool:
    """Whether a tool returned a model that is no smaller."""
    return bool(row["peers"][peer]["parameters"] >= row["parameters"]["before"])


def _time(models: dict[str, Row], peers: Row) -> Iterator[str]:
    yield from _head(
        "model", "parameters", "left", "forward", "copy", "cold", "warm", "verified", "warm / forward",
        "warm / copy", *peers, "warm / Torch-Pruning",
    )  # fmt: skip
    for name, row in models.items():
        others = [row["peers"].get(peer, {}).get("seconds") for peer in peers]
        theirs = row["peers"].get("Torch-Pruning", {}).get("seconds")
        yield _line(
            name,
            f"{row['parameters']['before'] / 1e6:.1f} M",
            f"{row['parameters']['after'] / row['parameters']['before']:.0%}",
            *(f"{row[key]:.3f}" for key in ("forward", "copy", "cold", "warm", "verified")),
            f"{row['warm'] / row['forward']:.1f}",
            f"{row['warm'] / row['copy']:.1f}",
            *(DASH if other is None else f"{other:.3f}" for other in others),
            DASH if theirs is None else f"{row['warm'] / theirs:.2f}",
        )
    yield ""


def _stages(models: dict[str, Row]) -> Iterator[str]:
    stages = list(dict.fromkeys(stage for row in models.values() for stage in row["stages"]))
    yield from _head("model", "graph nodes", "solves", *stages)
    for name, row in models.items():
        times = [f"{1e3 * row['stages'][stage]:.0f}" if stage in row["stages"] else DASH for stage in stages]
        yield _line(name, str(row["nodes"]), str(row["solves"]), *times)
    yield ""


def _memory(rows: dict[str, Row], peers: Row) -> Iterator[str]:
    kinds = {"speedup": "peak", "verified": "verified"}
    yield from _head("model", "parameters, MB", *kinds, *(f"{kind} / parameters" for kind in kinds), *peers)
    for name, row in rows.items():
        yield _line(
            name,
            f"{row['bytes'] / 1e6:.0f}",
            *(f"{row[key] / 1e6:.0f}" for key in kinds.values()),
            *(f"{row[key] / row['bytes']:.2f}" for key in kinds.values()),
            *(f"{row['peers'][peer] / 1e6:.0f}" if row["peers"].get(peer) else DASH for peer in peers),
        )
    yield ""


def _failures(models: dict[str, Row]) -> Iterator[str]:
    for name, row in models.items():
        if "failure" in row:
            yield f"* {name}: `{row['failure']}`"
        for peer, found in row.get("peers", {}).items():
            if "failure" in found:
                yield f"* {peer} on {name}: `{found['failure']}`"


def _head(*titles: str) -> Iterator[str]:
    yield _line(*titles)
    yield _line("---", *["---:"] * (len(titles) - 1))


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
