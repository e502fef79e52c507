"""A report as one HTML page that needs nothing else: no network, no libraries."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from maskprop.reasons import ranges
from maskprop.view.network import Box, Network, network

if TYPE_CHECKING:
    from maskprop.report import Layer, Report

_FILES = resources.files("maskprop.view")
_STYLE = _FILES.joinpath("page.css").read_text(encoding="utf-8")
_SCRIPT = _FILES.joinpath("page.js").read_text(encoding="utf-8")

_ROW, _COLUMN, _WIDTH, _HEIGHT = 46, 190, 170, 26
_BOW = 90  # how far a line may lead around boxes


def page(report: Report) -> str:
    """The whole page."""
    sections = (_head, _widths, _graph, _kept, _details)
    body = "".join(section(report) for section in sections) if report.plan is not None else _head(report)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(f'maskprop: {report.model}')}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>body {{ margin: 0; background: var(--back) }}\n{_STYLE}</style></head>"
        f'<body><main class="maskprop">{body}</main><script>{_SCRIPT}</script></body></html>\n'
    )


def fragment(report: Report) -> str:
    """The summary and the widths, for a notebook cell."""
    return f'<style>{_STYLE}</style><div class="maskprop">{_head(report)}{_widths(report)}</div>'


def _head(report: Report) -> str:
    if report.plan is None:
        return "<h1>maskprop</h1><p>No speedup has run yet.</p>"
    cards = [
        _card("parameters", f"{report.parameters[1]:,}", _share(report.parameters)),
        _card("size", _bytes(report.bytes[1]), _share(report.bytes)),
        _card("FLOPs", _si(report.flops[1]), _share(report.flops)),
    ]
    if report.check is not None:
        kind, word = ("good", "verified") if report.check.passed else ("bad", "differs")
        name = f"relative error, tolerance {report.check.tolerance:.0e}"
        cards.append(_card(name, f'<span class="{kind}">{word}</span>', f"{report.check.error:.1e}"))
    else:
        cards.append(_card("verification", "off", "not compared"))
    how = f'<div class="soft">rewritten through {escape(report.how)}</div>'
    return f'<h1>{escape(report.model)}</h1>{how}<div class="cards">{"".join(cards)}</div>'


def _card(name: str, value: str, note: str) -> str:
    return f'<div class="card"><b>{value}</b>{escape(note)}<br><span>{escape(name)}</span></div>'


def _widths(report: Report) -> str:
    widest = max((layer.width_before for layer in report.layers), default=1)
    rows = "".join(_width_row(layer, widest) for layer in report.layers)
    numbers = '<th class="num">units</th><th class="num">parameters</th>'
    head = f'<tr><th>layer</th><th>kind</th><th style="width:40%">width</th>{numbers}</tr>'
    return f"<h2>Widths</h2><table>{head}{rows}</table>"


def _width_row(layer: Layer, widest: int) -> str:
    before, after = layer.width_before, layer.width_after
    bar = f'<i style="width:{100 * after / max(before, 1):.1f}%"></i>'
    units = f"{before}" if before == after else f"{before} → {after}"
    return (
        f'<tr><td>{escape(layer.path) or "(the model)"}</td><td class="soft">{escape(layer.kind)}</td>'
        f'<td><div class="bar" style="width:{100 * before / widest:.1f}%">{bar}</div></td>'
        f'<td class="num">{units}</td>'
        f'<td class="num">{layer.parameters_before:,} → {layer.parameters_after:,}</td></tr>'
    )


def _graph(report: Report) -> str:
    if report.explainer is None:
        return ""
    note = "Boxes of one colour hold units that leave together. Drag to move, scroll to zoom."
    buttons = (("in", "+", "larger"), ("out", "−", "smaller"), ("all", "⤢", "the whole graph, or its start"))
    nav = "".join(f'<button data-zoom="{key}" title="{title}">{sign}</button>' for key, sign, title in buttons)
    drawing = f'<div class="graph">{_svg(network(report.explainer))}<nav>{nav}</nav></div>'
    return f'<h2>Coupling</h2><p class="soft">{note}</p>{drawing}'


def _svg(made: Network) -> str:
    boxes = made.boxes.values()
    left = min((b.x for b in boxes), default=0.0) * _COLUMN - _WIDTH
    right = max((b.x for b in boxes), default=0.0) * _COLUMN + _WIDTH + _BOW
    height = (max((b.y for b in boxes), default=0) + 1) * _ROW + 20
    view = f"{left:.0f} -20 {right - left:.0f} {height}"
    edges = "".join(_edge(made.boxes[a], made.boxes[b], made) for a, b in made.edges)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}">{edges}{"".join(map(_box, boxes))}</svg>'


def _edge(above: Box, below: Box, made: Network) -> str:
    """A line down; around the right side of boxes that stand between, as a residual block's do."""
    x0, y0, x1, y1 = above.x * _COLUMN, above.y * _ROW + _HEIGHT, below.x * _COLUMN, below.y * _ROW
    if not any(_between(box, above, below) for box in made.boxes.values()):
        return f'<path d="M{x0:.0f} {y0} C{x0:.0f} {y0 + 14} {x1:.0f} {y1 - 14} {x1:.0f} {y1}"/>'
    x0, x1, y0, y1 = x0 + _WIDTH / 2, x1 + _WIDTH / 2, y0 - _HEIGHT // 2, y1 + _HEIGHT // 2
    out = max(x0, x1) + min(16 + 8 * (below.y - above.y), _BOW)
    return f'<path d="M{x0:.0f} {y0} C{out:.0f} {y0 + 10} {out:.0f} {y1 - 10} {x1:.0f} {y1}"/>'


def _between(box: Box, above: Box, below: Box) -> bool:
    """Whether a straight line from one box to another crosses a third."""
    if not above.y < box.y < below.y:
        return False
    x = above.x + (below.x - above.x) * (box.y - above.y) / (below.y - above.y)
    return abs(box.x - x) * _COLUMN < _WIDTH / 2


def _box(box: Box) -> str:
    width = "" if box.before is None else f" {box.before}"
    if box.before != box.after:
        width += f"→{box.after}"
    room = 27 - len(width)
    shown = box.label if len(box.label) <= room else "…" + box.label[1 - room :]
    x, y = box.x * _COLUMN, box.y * _ROW
    size = f'x="{x - _WIDTH / 2:.0f}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"'
    return (
        f'<g><title>{escape(box.label + width)}</title><rect {size} fill="{_hue(box.group)}"/>'
        f'<text x="{x:.0f}" y="{y + 17}" text-anchor="middle">{escape(shown + width)}</text></g>'
    )


def _hue(group: int) -> str:
    """Colours as far apart as the golden angle makes them; grey for what never shrinks."""
    return "#d8dee4" if group < 0 else f"hsl({(group * 137.5) % 360:.0f} 65% 78%)"


def _kept(report: Report) -> str:
    if not report.kept:
        return "<h2>What stayed and why</h2><p>Every unit that the masks prune whole is gone.</p>"
    rows = "".join(
        f'<tr><td><code>{escape(kept.parameter)}</code></td><td class="num">axis {kept.axis}</td>'
        f"<td>{escape(ranges(kept.units))}</td><td>{escape(kept.reason.text)}"
        f'<div class="soft">{escape(" → ".join(kept.reason.path))}</div></td></tr>'
        for kept in report.kept
    )
    head = "<tr><th>parameter</th><th></th><th>units</th><th>reason</th></tr>"
    return f"<h2>What stayed and why</h2><table>{head}{rows}</table>"


def _details(report: Report) -> str:
    rows = [
        f"<tr><td><code>{escape(c.module)}.{escape(c.attribute)}</code></td>"
        f"<td>{escape(str(c.before))} → {escape(str(c.after))}</td></tr>"
        for c in report.changes
    ]
    summary = f"<summary>{len(rows)} attributes changed</summary>"
    attributes = f"<details>{summary}<table>{''.join(rows)}</table></details>" if rows else ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in report.lines() if not line.startswith("kept"))
    return f"<h2>Details</h2><ul>{lines}</ul>{attributes}"


def _share(values: tuple[int, int]) -> str:
    return f"{values[1] / values[0] - 1:+.1%} of {_si(values[0])}" if values[0] else ""


def _si(value: float) -> str:
    for unit in ("", "K", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}".strip()
        value /= 1000
    return f"{value:.3g} T"


def _bytes(value: float) -> str:
    return f"{_si(value)}B" if value >= 1000 else f"{value:.0f} B"
