"""The section of ``docs/coverage.md`` that puts Torch-Pruning beside maskprop over the zoos."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results" / "zoo_peer.jsonl"

OUTCOMES = {
    "right": "the pruned model runs and computes what the masked model does (relative L2 error at most 1e-4)",
    "wrong": "it runs, and computes something else, **without an error**",
    "breaks": "its forward raises",
    "nothing": "it removes nothing",
    "fails": "Torch-Pruning raises",
    "timeout": "Torch-Pruning does not end",
    "unread": "it prunes, and its own history cannot be repeated on a copy, so that nothing can be compared",
    "unbuilt": "the model could not be made",
}

PREFACE = """Written from `benchmarks/results/zoo_peer.jsonl`, which `python -m benchmarks.zoo_peer` makes.
Torch-Pruning 1.6.1 halves every group by L1 norm, as it is by default and told of nothing but the last layer. Where
that ends, but not right, and heads are found, it is asked again (*told*): of the heads, and to leave layer norms' axes
alone. What it removed then masks the dense model, element by element, and maskprop speeds that up: the same units.
"""


def read(path: Path = RESULTS) -> list[Row]:
    """The newest row of each model and way of asking."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        rows[row["zoo"], row["model"], row["asked"]] = row
    return [rows[key] for key in sorted(rows)]


def section(rows: list[Row]) -> Iterator[str]:
    """The lines of the section; none where nothing was run."""
    if not rows:
        return
    default = [row for row in rows if row["asked"] == "default"]
    masked = [row for row in rows if "ours" in row]
    right = [row for row in masked if row["theirs"] == "right"]
    exact = [row for row in masked if row["ours"] == "exact"]
    larger = [row for row in right if row["ours"] != "exact" or row["after"] > row["parameters"]]
    yield "## Beside Torch-Pruning, on the same units"
    yield ""
    yield PREFACE
    runs = _count(default, "right", "wrong")
    yield f"* By default it gives a model that runs for {runs} of {len(default)} models, and one that computes what the"
    yield f"  masked model does for **{_count(default, 'right')}**."
    yield f"* maskprop, on what it removed: **{len(exact)} of {len(masked)} exact**."
    smaller = sum(row["after"] < row["parameters"] for row in right if row not in larger)
    yield f"* Where Torch-Pruning is right, maskprop leaves more parameters than it does in **{len(larger)} of"
    yield f"  {len(right)}** rows, and fewer in {smaller}."
    yield ""
    zoos = sorted({row["zoo"] for row in default})
    outcomes = [outcome for outcome in OUTCOMES if _count(default, outcome)]
    yield "| Torch-Pruning by default | meaning | " + " | ".join(zoos) + " |"
    yield "|---|---|" + "---:|" * len(zoos)
    for outcome in outcomes:
        counts = (str(_count([row for row in default if row["zoo"] == zoo], outcome)) for zoo in zoos)
        yield f"| {outcome} | {OUTCOMES[outcome]} | " + " | ".join(counts) + " |"
    yield ""
    yield "| zoo | model | asked | Torch-Pruning | its error | dense | its parameters | ours | our error |"
    yield "|---|---|---|---|---:|---:|---:|---:|---:|"
    yield from map(_line, rows)
    yield ""


def _count(rows: list[Row], *outcomes: str) -> int:
    tally = Counter(row["theirs"] for row in rows)
    return sum(tally[outcome] for outcome in outcomes)


def _line(row: Row) -> str:
    theirs = row["theirs"] if "why" not in row else f"{row['theirs']}: {' '.join(row['why'].split())[:90]}"
    ours = "" if "ours" not in row else f"{row['after']:,}" if row["ours"] == "exact" else f"**{row['ours']}**"
    cells = [
        row["zoo"],
        row["model"],
        row["asked"],
        theirs.replace("|", "\\|"),
        _error(row.get("error")),
        f"{row['before']:,}" if "before" in row else "",
        f"{row['parameters']:,}" if "parameters" in row else "",
        ours,
        _error(row.get("ours_error")),
    ]
    return "| " + " | ".join(cells) + " |"


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"
