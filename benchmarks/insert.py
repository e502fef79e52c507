"""Puts what a benchmark found into a page of the documentation."""

from __future__ import annotations

from pathlib import Path


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- end of name -->``."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    assert found, f"{page} has no {start!r}"
    page.write_text(f"{before}{start}{text}{end}{rest.partition(end)[2]}", encoding="utf-8")
