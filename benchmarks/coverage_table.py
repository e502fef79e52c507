"""``docs/coverage.md`` out of the rows of a coverage run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: Outcomes in the order in which they are told.
OUTCOMES = {
    "exact": "equal to the masked model (relative L2 error at most 1e-4 on fresh inputs)",
    "mismatch": "**wrong without an error**",
    "refused": "an error of the engine's family; the model is unchanged",
    "crashed": "any other error",
    "timeout": "took too long",
    "died": "the process died, of memory as a rule",
    "unbuilt": "the model or its masks could not be made",
}


def write_table(rows: list[Row], path: Path) -> None:
    """Writes the page: totals, what needs attention, then every row."""
    rows = [row for row in rows if row["masking"] != "done" and row["zoo"] != "handmade"]
    rows.sort(key=lambda row: (row["zoo"], row["model"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_page(rows)) + "\n")


def _page(rows: list[Row]) -> Iterable[str]:
    models = {(row["zoo"], row["model"]) for row in rows}
    exact = [row for row in rows if row["outcome"] == "exact"]
    clean = models - {(row["zoo"], row["model"]) for row in rows if row["outcome"] != "exact"}
    mismatches = sum(row["outcome"] == "mismatch" for row in rows)
    yield "# Coverage"
    yield ""
    yield "Written by `python -m benchmarks.coverage`; `benchmarks/zoo/maskings.py` describes the maskings."
    yield "Weights, biases, norms and running statistics are random. Parameters are counted as elements, tied"
    yield "ones once. Seconds are those of one speedup on a shared machine, and no benchmark."
    yield ""
    yield f"* **{len(clean)} of {len(models)} models are exact under every masking** that fits them."
    yield f"* {len(exact)} of {len(rows)} speedups are exact; {_share(exact)} of those removed parameters."
    yield f"* **Silent mismatches: {mismatches}.**"
    yield ""
    yield from _counts("zoo", rows, lambda row: row["zoo"])
    yield from _counts("masking", rows, lambda row: row["masking"])
    yield "| outcome | meaning |"
    yield "|---|---|"
    yield from (f"| {outcome} | {meaning} |" for outcome, meaning in OUTCOMES.items())
    yield ""
    yield from _generated(exact)
    yield from _section("Not exact", [row for row in rows if row["outcome"] != "exact"])
    for zoo in sorted({row["zoo"] for row in rows}):
        yield from _section(zoo, [row for row in rows if row["zoo"] == zoo])


def _share(exact: list[Row]) -> str:
    return str(sum(row["after"] < row["before"] for row in exact))


def _counts(title: str, rows: list[Row], key: Callable[[Row], str]) -> Iterable[str]:
    tallies: dict[str, Counter[str]] = {}
    for row in rows:
        tallies.setdefault(key(row), Counter())[row["outcome"]] += 1
    outcomes = [outcome for outcome in OUTCOMES if any(tally[outcome] for tally in tallies.values())]
    yield f"| {title} | " + " | ".join(outcomes) + " | total |"
    yield "|---|" + "---:|" * (len(outcomes) + 1)
    for name, tally in tallies.items():
        cells = [str(tally[outcome]) for outcome in outcomes]
        yield f"| {name} | " + " | ".join([*cells, str(sum(tally.values()))]) + " |"
    yield ""


def _generated(exact: list[Row]) -> Iterable[str]:
    """The classes that needed a generated forward, with the reason and the models that hold them."""
    reasons: dict[str, str] = {}
    holders: dict[str, set[str]] = {}
    for row in exact:
        for kind, reason in row.get("extra", {}).get("generated", {}).items():
            reasons.setdefault(kind, reason)
            holders.setdefault(kind, set()).add(row["model"])
    yield f"## Generated forwards: {len(reasons)}"
    yield ""
    if reasons:
        yield "| class | because of | in |"
        yield "|---|---|---|"
    for kind, reason in sorted(reasons.items()):
        yield f"| `{kind}` | {_cell(reason)} | {', '.join(sorted(holders[kind]))} |"
    yield ""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:400]


def _section(title: str, rows: list[Row]) -> Iterable[str]:
    yield f"## {title}: {len(rows)}"
    yield ""
    if rows:
        yield "| model | masking | before | after | error | seconds | how |"
        yield "|---|---|---:|---:|---:|---:|---|"
    for row in rows:
        how = row.get("how", "") if row["outcome"] == "exact" else f"**{row['outcome']}**: {row.get('detail')}"
        cells = [
            row["model"],
            row["masking"],
            f"{row['before']:,}" if row.get("before") else "",
            f"{row['after']:,}" if row.get("after") else "",
            f"{row['error']:.1e}" if row.get("error") is not None else "",
            f"{row['seconds']:.1f}" if row.get("seconds") else "",
            _cell(how),
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""
