"""``docs/coverage.md`` out of the rows of coverage runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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

PREFACE = """Written by `python -m benchmarks.coverage` from the JSON lines in
`benchmarks/results/coverage`; a run resumes what is there, `--redo` runs it anew.
[maskings.py](../benchmarks/zoo/maskings.py) describes the maskings, each of which masks about half of what it names.
Weights, biases, norms and running statistics are random. Each result is compared with the masked model on inputs that
no stage of the speedup has seen, at two batch sizes (and another length where a model takes any). Parameters are
counted as elements, tied ones once. Seconds are those of one speedup on a shared machine, and no benchmark.
"""


def write_table(rows: list[Row], path: Path, held: Mapping[str, int] | None = None, beside: Iterable[str] = ()) -> None:
    """Writes the page: totals, what needs attention, other tools, then every row.

    Args:
        rows: of all zoos.
        path: of the page.
        held: how many models each zoo holds.
        beside: lines about other tools.
    """
    rows = [row for row in rows if row["masking"] != "done" and row["zoo"] != "handmade"]
    rows.sort(key=lambda row: (row["zoo"], row["model"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_page(rows, held or {}, beside)) + "\n")


def _page(rows: list[Row], held: Mapping[str, int], beside: Iterable[str]) -> Iterable[str]:
    models = {_model(row) for row in rows}
    exact = [row for row in rows if row["outcome"] == "exact"]
    clean = models - {_model(row) for row in rows if row["outcome"] != "exact"}
    generated = {_model(row) for row in exact if row.get("extra", {}).get("generated")}
    mismatches = sum(row["outcome"] == "mismatch" for row in rows)
    yield "# Coverage"
    yield ""
    yield f"* **{len(clean)} of {len(models)} models are exact under every masking** that fits them and was run."
    yield f"* {len(exact)} of {len(rows)} speedups are exact; {sum(map(_smaller, exact))} of those removed parameters."
    yield f"* **Silent mismatches: {mismatches}.** Not exact, for whatever reason: {len(rows) - len(exact)}."
    for zoo, count in held.items():
        run = sum(name == zoo for name, _ in models)
        if run < count:
            yield f"* **Not run with this engine yet: {count - run} of the {count} models of {zoo}.**"
    yield f"* {len(models) - len(generated)} models needed no generated forward under any masking."
    yield ""
    yield PREFACE
    yield from _counts("zoo", rows, lambda row: row["zoo"])
    yield from _counts("masking", rows, lambda row: row["masking"])
    yield "| outcome | meaning |"
    yield "|---|---|"
    yield from (f"| {outcome} | {meaning} |" for outcome, meaning in OUTCOMES.items())
    yield ""
    yield from _section("Not exact", [row for row in rows if row["outcome"] != "exact"])
    yield from _generated(exact)
    yield from _kept([row for row in exact if not _smaller(row)])
    yield from beside
    for zoo in sorted({row["zoo"] for row in rows}):
        yield from _section(zoo, [row for row in rows if row["zoo"] == zoo])


def _model(row: Row) -> tuple[str, str]:
    return row["zoo"], row["model"]


def _smaller(row: Row) -> bool:
    return bool(row["after"] < row["before"])


def _counts(title: str, rows: list[Row], key: Callable[[Row], str]) -> Iterable[str]:
    tallies: dict[str, Counter[str]] = {}
    models: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        tally = tallies.setdefault(key(row), Counter())
        tally[row["outcome"]] += 1
        tally["smaller"] += row["outcome"] == "exact" and _smaller(row)
        models.setdefault(key(row), set()).add(_model(row))
    outcomes = [outcome for outcome in OUTCOMES if any(tally[outcome] for tally in tallies.values())]
    yield f"| {title} | models | speedups | " + " | ".join(outcomes) + " | exact and smaller |"
    yield "|---|" + "---:|" * (len(outcomes) + 3)
    for name, tally in tallies.items():
        total = sum(tally[outcome] for outcome in outcomes)
        cells = [len(models[name]), total, *(tally[outcome] for outcome in outcomes), tally["smaller"]]
        yield f"| {name} | " + " | ".join(map(str, cells)) + " |"
    yield ""


#: What stands where a generated forward differs from the author's.
CHANGES = {
    "computed": "a size or a scale that is computed from what changed, as in `C // self.num_heads`",
    "literal": "a number that stands in the code",
    "whole": "one that is no single expression: the whole forward was traced and written anew",
}


def _generated(exact: list[Row]) -> Iterable[str]:
    """The classes that needed a generated forward, with the reason and the models that hold them."""
    reasons: dict[str, str] = {}
    holders: dict[str, set[str]] = {}
    changed: dict[str, dict[str, str]] = {}
    for row in exact:
        extra = row.get("extra", {})
        for kind, reason in extra.get("generated", {}).items():
            reasons.setdefault(kind, reason)
            holders.setdefault(kind, set()).add(row["model"])
            if "changed" in extra:
                changed.setdefault(kind, {}).update(extra["changed"][kind] or {"": "whole"})
    yield f"## Generated forwards: {len(reasons)}"
    yield ""
    yield "Classes whose author's `forward` cannot be mended by setting an attribute, because it holds"
    yield ""
    for change, meaning in CHANGES.items():
        count = sum(change in parts.values() for parts in changed.values())
        yield f"* {meaning}: {count} classes;"
    yield ""
    yield "with the expressions that were changed, and the first op that the author's own forward gets wrong."
    yield ""
    if reasons:
        yield "| class | changed | because of | in |"
        yield "|---|---|---|---|"
    for kind, reason in sorted(reasons.items()):
        parts = changed.get(kind, {})
        cell = "; ".join(f"{change}: `{_cell(text)}`" if text else change for text, change in parts.items())
        yield f"| `{kind}` | {cell} | {_cell(reason)} | {', '.join(sorted(holders[kind]))} |"
    yield ""


def _kept(rows: list[Row]) -> Iterable[str]:
    """Why nothing left, where nothing did."""
    yield f"## Exact, and nothing left: {len(rows)}"
    yield ""
    if rows:
        yield "| model | masking | the most frequent reasons |"
        yield "|---|---|---|"
    yield from (f"| {row['model']} | {row['masking']} | {_cell(row.get('detail', ''))} |" for row in rows)
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
