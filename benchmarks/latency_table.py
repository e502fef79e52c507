"""The tables and the plot of ``benchmarks.latency``."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .machine import sentence

Row = dict[str, Any]
Setting = tuple[str, str, str, str, int]
DASH = "—"
NEAR = 0.03

EXPLANATION = (
    "Where fewer FLOPs do not save as much time, the columns on products say why. FLOPs are counted of convolutions",
    "and matrix products (*in products*: their part of the dense time, by torch's profiler). Where half of the units",
    "leave on both sides of a product, a quarter of its FLOPs is left, but half of the numbers that norms,",
    "activations, additions and softmax pass through memory (*of the rest*): the larger their part, the further the",
    "speedup stays behind. So do products that are bound by memory or by the cost of a call: depthwise convolutions,",
    "of few FLOPs for each number that they read; small ones at batch 1; and widths that do not fill the vector",
    "registers or tiles.",
    "",
)


def sentence_of(machine: Row) -> str:
    """One line on a machine, its GPU first."""
    if "cuda" not in machine:
        return sentence(machine)
    return (
        f"{machine['name']}, CUDA {machine['cuda']}, clocks (SM, memory), power and temperature {machine['clocks']}; "
        + (sentence(machine))
    )


def tables(results: Row) -> Iterator[str]:
    """A table for each device, mode, dtype, layout and batch."""
    rows = [row for row in results["rows"] if "seconds" in row]
    yield from _summary(rows)
    yield from EXPLANATION
    for setting in dict.fromkeys(map(_setting, rows)):
        _, mode, dtype, layout, batch = setting
        here = [row for row in rows if _setting(row) == setting]
        yield f"### {here[0]['machine']}: {mode}, {dtype}, {layout.replace('_', ' ')}, batch {batch}"
        yield ""
        yield _line(
            "model", "keeps multiples of", "dense, ms", "compact, ms", "thin, ms", "compact / thin", "control / thin",
            "FLOPs ratio", "speedup", "speedup / FLOPs ratio", "in products", "their speedup", "of the rest",
            "samples/s", "memory, dense, MB", "compact, MB", "spread",
        )  # fmt: skip
        yield _line("---", *["---:"] * 16)
        for name in dict.fromkeys(row["model"] for row in here):
            mine = {(row["kind"], row["multiple"]): row for row in here if row["model"] == name}
            yield from _lines(name, mine)
        yield ""
    failures = [row for row in results["rows"] if "failure" in row]
    if failures:
        yield "### What did not run"
        yield ""
        for row in failures:
            what = ", ".join(
                str(row[key]) for key in ("kind", "device", "mode", "dtype", "layout", "batch") if key in row
            )
            yield f"* {row['model']} {what}: `{' '.join(row['failure'].split())[:200]}`"
        yield ""


def _lines(name: str, mine: dict[tuple[str, int], Row]) -> Iterator[str]:
    dense = mine.get(("dense", 1))
    if dense is None:
        return
    for (kind, multiple), row in mine.items():
        if kind != "compact":
            continue
        thin, control = (mine.get((other, multiple)) for other in ("thin", "control"))
        speedup, flops = dense["seconds"] / row["seconds"], dense["flops"] / row["flops"]
        yield _line(
            name,
            str(multiple),
            f"{1e3 * dense['seconds']:.2f}",
            f"{1e3 * row['seconds']:.2f}",
            DASH if thin is None else f"{1e3 * thin['seconds']:.2f}",
            *(_ratio(other) for other in (row, control)),
            f"{flops:.2f}",
            f"**{speedup:.2f}**",
            f"{speedup / flops:.2f}",
            *_parts(dense, row),
            f"{row['throughput']:.0f}",
            *(DASH if r["memory"] is None else f"{r['memory'] / 1e6:.0f}" for r in (dense, row)),
            f"{row['spread']:.0%}",
        )


def _parts(dense: Row, row: Row) -> Iterator[str]:
    """What part of the dense time goes into products, and by how much they and the rest are faster."""
    if "products" not in dense or "products" not in row:
        yield from (DASH, DASH, DASH)
        return
    yield f"{dense['products']:.0%}"
    for old, new in ((dense["products"], row["products"]), (1 - dense["products"], 1 - row["products"])):
        yield f"{dense['seconds'] * old / (row['seconds'] * new):.2f}" if new else DASH


def _ratio(row: Row | None) -> str:
    """To the thin model's time, with its interval."""
    if row is None or "to_thin" not in row:
        return DASH
    return f"{row['to_thin']:.3f} ± {row['to_thin_error']:.3f}"


def _summary(rows: list[Row]) -> Iterator[str]:
    by_key = {(row["model"], row["kind"], row["multiple"], _setting(row)): row for row in rows}
    for kind, name in (("compact", "Compact"), ("control", "As a control, a second natively thin model")):
        compared = [row for row in rows if row["kind"] == kind and "to_thin" in row]
        if not compared:
            continue
        shares = [row["to_thin"] for row in compared]
        near = sum(abs(share - 1) <= NEAR for share in shares)
        told_apart = sum(abs(row["to_thin"] - 1) - row["to_thin_error"] > NEAR for row in compared)
        yield (
            f"* {name} against natively thin: {near} of {len(shares)} measurements within {NEAR:.0%} of each other, "
            f"median of the ratios {statistics.median(shares):.3f}, from {min(shares):.3f} to {max(shares):.3f}. "
            f"Further apart than {NEAR:.0%} by more than the interval says: {told_apart or 'none'}."
        )
    pairs = {(row["model"], row["multiple"]): row["same_calls"] for row in rows if "same_calls" in row}
    if pairs:
        yield (
            f"* In {sum(pairs.values())} of {len(pairs)} pairs the compact model makes call for call the ATen calls "
            "of the thin one: the same ops on tensors of the same shapes, strides, dtypes and alignment. What a clock "
            "shows between such models is no difference in the work; the spread stands beside each."
        )
    for multiple in sorted({row["multiple"] for row in rows if row["kind"] == "compact"}):
        gains, part = [], []
        for (model, kind, m, setting), row in by_key.items():
            dense = by_key.get((model, "dense", 1, setting))
            if kind == "compact" and m == multiple and dense is not None:
                gains.append(dense["seconds"] / row["seconds"])
                part.append(gains[-1] * row["flops"] / dense["flops"])
        if gains:
            yield (
                f"* Multiples of {multiple}: speedup {statistics.geometric_mean(gains):.2f} in the geometric mean, "
                f"{statistics.geometric_mean(part):.0%} of the FLOPs ratio."
            )
    yield ""


def draw(results: Row, path: Path) -> bool:
    """Speedup against the FLOPs ratio, a panel for each setting; whether there was anything to draw."""
    rows = [row for row in results["rows"] if "seconds" in row]
    settings = list(dict.fromkeys(map(_setting, rows)))
    if not settings:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(4, len(settings))
    lines = -(-len(settings) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(settings) :]:
        axis.set_visible(False)
    for axis, setting in zip(axes.flat, settings, strict=False):
        here = [row for row in rows if _setting(row) == setting]
        dense = {row["model"]: row for row in here if row["kind"] == "dense"}
        for multiple in sorted({row["multiple"] for row in here if row["kind"] == "compact"}):
            pairs = [
                (dense[r["model"]]["flops"] / r["flops"], dense[r["model"]]["seconds"] / r["seconds"])
                for r in here
                if r["kind"] == "compact" and r["multiple"] == multiple and r["model"] in dense
            ]
            axis.plot(*zip(*pairs, strict=True), ".", label=f"multiples of {multiple}")
        top = max(axis.get_xlim()[1], axis.get_ylim()[1])
        axis.plot([1, top], [1, top], color="grey", linewidth=0.8)
        axis.set(xlabel="FLOPs ratio", ylabel="speedup", title=" ".join(map(str, setting)))
        axis.title.set_fontsize(8)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _setting(row: Row) -> Setting:
    return row["device"], row["mode"], row["dtype"], row["layout"], row["batch"]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
