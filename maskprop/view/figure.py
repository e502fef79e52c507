"""Widths before and after, drawn with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskprop._extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maskprop.report import Report


def figure(report: Report) -> Figure:
    """One bar a layer: its width before, with the part that is left in front.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    layers = report.layers
    made: Figure = require("matplotlib.figure", "report", "report.plot").Figure(
        figsize=(8, 1.2 + 0.22 * max(len(layers), 1)), layout="constrained"
    )
    axes = made.subplots()
    places = range(len(layers))
    axes.barh(places, [layer.width_before for layer in layers], color="#d0d7de", label="before")
    axes.barh(places, [layer.width_after for layer in layers], color="#2f6f9f", label="after")
    axes.set_yticks(places, [layer.path or "(the model)" for layer in layers], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("units along the output axis")
    axes.set_title(f"{report.model}: {report.parameters[0]:,} → {report.parameters[1]:,} parameters")
    made.legend(loc="outside lower center", ncols=2)  # beside the axes: bars may reach any corner
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return made
