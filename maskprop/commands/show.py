"""`maskprop show`: what a saved plan says, without building the model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from maskprop.commands import Command
from maskprop.commands.options import add_json, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The directory and how much to tell."""
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="a directory that maskprop.save, maskprop.hf.save_pretrained or `maskprop compact` wrote",
    )
    parser.add_argument("--units", action="store_true", help="list all indices that are kept (default: the first few)")
    parser.add_argument("--code", action="store_true", help="also print generated forwards")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Read the plan and print it."""
    from rich.console import Console

    found = _read(arguments.directory)
    if arguments.json:
        write_json(found)
        return 0
    console = Console()
    made = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    source = f", from {found['source']}" if found["source"] else ""
    console.print(f"{arguments.directory}: saved with {made}{source}", highlight=False, markup=False, soft_wrap=True)
    for path, record in found["parts"].items():
        for number, step in enumerate(record["steps"], 1):
            place = f" of '{path}'" if path else ""
            console.print(_table(f"speedup {number}{place}", step["plan"], arguments.units))
            for line in _changes(step["modules"], arguments.code):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _read(directory: Path) -> dict[str, Any]:
    """The plan of either kind of directory: versions, the source, and a record a part of the model."""
    from maskprop.errors import LoadError
    from maskprop.storage import PLAN, read_plan

    if (directory / "config.json").is_file() and not (directory / PLAN).is_file():
        from maskprop import hf

        if not (directory / hf.PLAN).is_file():
            raise LoadError(
                f"'{directory}' is a Hugging Face directory without a plan: its config.json says all sizes. It loads "
                "without maskprop."
            )
        record = hf.read_plan(directory, hf.PLAN)["record"]
        return {"versions": {"torch": record["dense"]["torch"]}, "source": None, "parts": {"": record}}
    saved = read_plan(directory)
    return {"versions": saved.versions, "source": saved.source, "parts": saved.records}


_ROOM = 40  # for the indices of a row, which may be thousands


def _table(title: str, plan: dict[str, Any], all_units: bool) -> object:
    from rich.table import Table

    from maskprop.reasons import ranges

    table = Table("tensor", "shape", "axis", "kept", "units", title=title)
    for name, keeps in plan["keep"].items():
        shape = "×".join(map(str, plan["shapes"][name]))
        for keep in keeps:
            ragged = bool(keep["over"])
            index = [] if ragged else keep["index"]
            size = plan["shapes"][name][keep["axis"]]
            units = "another choice along axes " + ", ".join(map(str, keep["over"])) if ragged else ranges(index)
            if not all_units and len(units) > _ROOM:
                units = units[:_ROOM].rpartition(",")[0] + ", …"
            count = "" if ragged else f"{len(index)} of {size}"
            table.add_row(name, shape, str(keep["axis"]), count, units)
    return table


def _changes(modules: dict[str, Any], code: bool) -> list[str]:
    lines = []
    for path, change in modules.items():
        for name, (old, new) in change["attributes"].items():
            lines.append(f"{path or 'model'}.{name}: {_value(old)} → {_value(new)}")
        if "class" in change:
            source = change["class"].get("source") or change["class"].get("text")
            lines.append(
                f"{path or 'model'}: generated forward" if source else f"{path}: becomes {change['class']['name']}"
            )
            if source and code:
                lines.append(source)
    return lines


def _value(value: Any) -> Any:
    return tuple(value["tuple"]) if isinstance(value, dict) else value


COMMAND = Command(
    "show",
    "Show the plan of a saved model.",
    add_arguments,
    run,
    "  maskprop show small\n  maskprop show small --code\n  maskprop show small --json",
)
