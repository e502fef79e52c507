"""Why units left or stayed, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reason:
    """Why one unit left or stayed.

    Attributes:
        left: whether the unit is gone.
        text: the reason, as the predicate of a sentence about the unit.
        reader: module that reads the unit, where there is one.
        writers: modules that write something into it that depends on the model's input.
        path: modules from the parameter to what decided, in the order of the dependency graph.
    """

    left: bool
    text: str
    reader: str = ""
    writers: tuple[str, ...] = ()
    path: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Reasons for all units of one axis of a parameter.

    Attributes:
        parameter: its name.
        axis: the axis that is explained.
        units: one reason a unit, in order.
    """

    parameter: str
    axis: int
    units: tuple[Reason, ...]

    @property
    def left(self) -> list[int]:
        """Units that are gone."""
        return [i for i, reason in enumerate(self.units) if reason.left]

    @property
    def stayed(self) -> list[int]:
        """Units that are still there."""
        return [i for i, reason in enumerate(self.units) if not reason.left]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings; units of one reason together."""
        return {
            "parameter": self.parameter,
            "axis": self.axis,
            "reasons": [
                {
                    "units": units,
                    "left": r.left,
                    "text": r.text,
                    "reader": r.reader,
                    "writers": list(r.writers),
                    "path": list(r.path),
                }
                for r, units in self._grouped()
            ],
        }

    def _grouped(self) -> list[tuple[Reason, list[int]]]:
        found: dict[Reason, list[int]] = {}
        for i, reason in enumerate(self.units):
            found.setdefault(reason, []).append(i)
        return list(found.items())

    def __str__(self) -> str:
        lines = [f"{self.parameter}, axis {self.axis}: {len(self.stayed)} of {len(self.units)} units stay"]
        for reason, units in self._grouped():
            lines.append(f"  {'left' if reason.left else 'kept'} {ranges(units)}: {reason.text}")
            if reason.path:
                lines.append(f"      {' → '.join(reason.path)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from maskprop.view.tables import html_table

        rows = (
            (ranges(units), "left" if r.left else "kept", r.text, " → ".join(r.path)) for r, units in self._grouped()
        )
        caption = f"{self.parameter}, axis {self.axis}: {len(self.stayed)} of {len(self.units)} units stay"
        return html_table(caption, ("units", "", "reason", "path"), rows)


@dataclass(frozen=True)
class Kept:
    """Units that a mask prunes whole and that are still there.

    Attributes:
        parameter, axis, units: which.
        reason: why they stayed.
    """

    parameter: str
    axis: int
    units: tuple[int, ...]
    reason: Reason

    def __str__(self) -> str:
        return f"{self.parameter}, axis {self.axis}, {ranges(self.units)}: {self.reason.text}"


def ranges(units: Iterable[int]) -> str:
    """Indices in short: ``0-3, 7``."""
    parts: list[list[int]] = []
    for unit in units:
        if parts and unit == parts[-1][1] + 1:
            parts[-1][1] = unit
        else:
            parts.append([unit, unit])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
