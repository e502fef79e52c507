"""A picture of the groups: who produces a group's units and who reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from maskprop._extras import require

if TYPE_CHECKING:
    from maskprop.pruning.groups import Groups

_COLOURS = {
    "channel": "#0072B2",
    "channel group": "#56B4E9",
    "head": "#D55E00",
    "head dim": "#E69F00",
    "query group": "#CC79A7",
    "expert": "#009E73",
}  # fmt: skip  (the Okabe-Ito palette)


def draw_groups(groups: Groups, path: Path) -> None:
    """A row a group, a column a module in the order of execution; filled: produces, hollow: reads.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure", "report", "Groups.draw")
    lines = require("matplotlib.lines", "report", "Groups.draw")
    modules = _order(groups)
    column = {m: i for i, m in enumerate(modules)}
    picture = figure.Figure(figsize=(2.5 + 0.22 * len(modules), 1.8 + 0.22 * len(groups)), layout="constrained")
    axes = picture.subplots()
    for row, group in enumerate(groups):
        colour = _COLOURS[group.granularity]
        made, read = [column[m] for m in group.modules], [column[m] for m in group.consumers]
        axes.plot([min(made + read), max(made + read)], [row, row], color=colour, linewidth=1, alpha=0.5)
        axes.scatter(read, [row] * len(read), facecolors="white", edgecolors=colour, s=28, zorder=2)
        axes.scatter(made, [row] * len(made), color=colour, s=16, zorder=3)
    axes.set_yticks(range(len(groups)), [f"{g.name} ({g.size})" for g in groups], fontsize=7)
    axes.set_xticks(range(len(modules)), modules, fontsize=7, rotation=90)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.3)
    kinds = [k for k in _COLOURS if any(g.granularity == k for g in groups)]
    handles = [lines.Line2D([], [], color=_COLOURS[k], marker="o", label=k) for k in kinds]
    handles += [
        lines.Line2D([], [], color="grey", marker="o", linestyle="", label="produces"),
        lines.Line2D([], [], color="grey", marker="o", linestyle="", markerfacecolor="white", label="reads"),
    ]
    picture.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8, frameon=False)
    picture.savefig(path)


def _order(groups: Groups) -> list[str]:
    """Modules in the order in which their parameters are first used."""
    found = dict.fromkeys(p for g in groups for p in (*g.modules, *g.consumers))
    if groups.graph is None:
        return list(found)
    used = dict.fromkeys(str(n.target).rpartition(".")[0] for n in groups.graph.fx.nodes if n.op == "get_attr")
    return [p for p in used if p in found] + [p for p in found if p not in used]
