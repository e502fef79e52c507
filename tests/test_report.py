"""The report: numbers that are right, text, JSON, the page in a real browser, the figure."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from maskprop import ModelSpeedup, Report
from maskprop.measure import count_flops, count_parameters
from maskprop.view.network import network
from maskprop.view.page import _COLUMN, _HEIGHT, _ROW, _WIDTH, _edge
from tests.models import ConvNet, LeNet, Transformer, example, randomise, rows, sped_up


def test_sizes_and_flops_are_those_of_the_models(generator: torch.Generator) -> None:
    dense = ConvNet().eval()
    speedup = sped_up(copy.deepcopy(dense), generator)
    report, x = speedup.report, example(dense, 2, generator)
    assert report.model == "ConvNet"
    assert report.parameters == (count_parameters(dense), count_parameters(speedup.model))
    assert report.flops == (count_flops(dense, x), count_flops(speedup.model, x))
    state = [m.state_dict().values() for m in (dense, speedup.model)]
    assert report.bytes == tuple(sum(t.numel() * t.element_size() for t in tensors) for tensors in state)
    assert 0 < report.reduction < 1
    assert {layer.path for layer in report.layers} == {
        "stem",
        "block.conv1",
        "block.norm",
        "block.conv2",
        "head",
    }
    for layer in report.layers:
        module = speedup.model.get_submodule(layer.path)
        assert layer.after == tuple(module.weight.shape)
        assert layer.before == tuple(dense.get_submodule(layer.path).weight.shape)
        assert layer.parameters_after == count_parameters(module)
    changed = {(c.module, c.attribute): (c.before, c.after) for c in report.changes}
    assert changed["block.conv1", "out_channels"] == (12, speedup.model.block.conv1.out_channels)


def test_flops_see_inside_fused_attention(generator: torch.Generator) -> None:
    speedup = sped_up(Transformer(), generator)
    before, after = speedup.report.flops
    # one layer: q, k, v, out: 8 * n * d^2; scores and mixture: 4 * n^2 * d; two linears: 4 * n * d * h
    n, d, h, batch = 16, 16, 24, 2
    layer = 8 * n * d * d + 4 * n * n * d + 4 * n * d * h
    patches, head = 2 * n * 3 * 16 * d, 2 * d * 5
    assert before == batch * (2 * layer + patches + head)
    d, h = 12, 21  # one of four heads and three of the hidden units are gone; the stream keeps its 16
    layer = 8 * n * 16 * d + 4 * n * n * d + 4 * n * 16 * h
    assert after == batch * (2 * layer + patches + head)


def test_before_anything_ran() -> None:
    assert str(Report()) == "No speedup has run yet.\n"
    assert Report().flops == (0, 0)
    assert "No speedup has run yet" in Report().to_html()
    assert json.loads(Report().to_json())["check"] is None


def test_text(generator: torch.Generator) -> None:
    speedup = sped_up(LeNet(), generator)
    text = str(speedup.report)
    for part in ("LeNet:", "fc1", "FLOPs", "verification  passed", "generated     forward of ''"):
        assert part in text
    assert speedup.report.table(all_layers=True).row_count == len(speedup.report.layers)
    assert "generated forward in" in speedup.report.how


def test_json(generator: torch.Generator) -> None:
    speedup = sped_up(ConvNet(), generator)
    found = json.loads(speedup.report.to_json())
    assert found["parameters"] == {
        "before": speedup.report.parameters[0],
        "after": speedup.report.parameters[1],
    }
    assert found["check"]["passed"] is True
    assert sum(layer["flops_after"] for layer in found["layers"]) == found["flops"]["after"]
    assert {(k["parameter"], tuple(k["units"])) for k in found["kept"]} == {
        (k.parameter, k.units) for k in speedup.report.kept
    }


class _Outside(HTMLParser):
    """Collects whatever would be fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v for k, v in attrs if k in ("src", "href") and v]


def test_page_needs_nothing_else(generator: torch.Generator, tmp_path: Path) -> None:
    speedup = sped_up(ConvNet(), generator)
    text = speedup.report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text
    parser = _Outside()
    parser.feed(text)
    assert parser.found == []
    assert "url(" not in text
    assert "@import" not in text
    for layer in speedup.report.layers:
        assert f"<td>{layer.path}</td>" in text
    assert text.count("<rect") == len(network(speedup.explainer).boxes)
    assert 'class="maskprop"' in speedup.report._repr_html_()


def test_page_escapes_names(generator: torch.Generator) -> None:
    model = nn.Sequential()
    model.add_module("<script>alert(1)</script>", nn.Linear(4, 6))
    model.add_module("b", nn.Linear(6, 2))
    randomise(model, generator)
    masks = rows(model, "<script>alert(1)</script>", [1])
    speedup = ModelSpeedup(model, torch.randn(2, 4, generator=generator), masks)
    speedup.speedup_model()
    assert "<script>alert" not in speedup.report.to_html()


def test_lines_lead_around_boxes(generator: torch.Generator) -> None:
    """No line of the drawing runs behind a box that it does not belong to, as a residual sum's would."""
    made = network(sped_up(ConvNet(), generator).explainer)
    around = 0
    for above, below in made.edges:
        a, b = made.boxes[above], made.boxes[below]
        x0, y0, *curve = map(float, re.findall(r"-?\d+", _edge(a, b, made)))
        around += max(curve[::2]) > max(a.x, b.x) * _COLUMN + _WIDTH / 2
        for t in torch.linspace(0, 1, 50).tolist():
            x, y = (
                (1 - t) ** 3 * start + 3 * t * (1 - t) ** 2 * c0 + 3 * t**2 * (1 - t) * c1 + t**3 * end
                for start, c0, c1, end in ((x0, *curve[::2]), (y0, *curve[1::2]))
            )
            for box in made.boxes.values():
                inside = abs(x - box.x * _COLUMN) < _WIDTH / 2 and box.y * _ROW < y < box.y * _ROW + _HEIGHT
                assert not inside or box in (a, b), (above, below, box.name)
    assert around > 0


def test_coupled_layers_share_a_colour(generator: torch.Generator) -> None:
    speedup = sped_up(ConvNet(), generator)
    made = network(speedup.explainer)
    boxes = made.boxes
    assert boxes["stem"].group == boxes["block.conv2"].group >= 0
    assert boxes["block.conv1"].group == boxes["block.norm"].group != boxes["stem"].group
    assert (boxes["block.conv1"].before, boxes["block.conv1"].after) == (
        12,
        speedup.model.block.conv1.out_channels,
    )
    assert ("stem", "block.conv1") in made.edges
    assert len({(b.x, b.y) for b in boxes.values()}) == len(boxes)


def test_page_in_a_browser(generator: torch.Generator, tmp_path: Path) -> None:
    """Chromium runs the script: the view box of the graph is fitted to the window.

    Where there is no browser, the page is not opened; `.ci/run` installs one if it can, and then insists.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    speedup = sped_up(ConvNet(), generator)
    text = speedup.report.to_html(tmp_path / "report.html")
    written = re.search(r'<svg[^>]* viewBox="([^"]+)"', text)
    assert written
    if browser is None:
        assert "MASKPROP_BROWSER_REQUIRED" not in os.environ
        return
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"--user-data-dir={tmp_path}/profile",
    ]
    shown = subprocess.run([*command, (tmp_path / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
    fitted = re.search(r'<svg[^>]* viewBox="([^"]+)"', shown.stdout)
    assert fitted
    assert fitted[1] != written[1]
    assert "<rect" in shown.stdout


def test_figure(generator: torch.Generator, tmp_path: Path) -> None:
    speedup = sped_up(ConvNet(), generator)
    figure = speedup.report.plot()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [layer.path for layer in speedup.report.layers]
    figure.savefig(tmp_path / "widths.png")
    assert (tmp_path / "widths.png").read_bytes().startswith(b"\x89PNG")


def test_opaque_ops_are_named(generator: torch.Generator) -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.sort(self.a(x), dim=-1).values)

    model = randomise(Sorted(), generator)
    speedup = ModelSpeedup(model, torch.randn(2, 4, generator=generator), rows(model, "a", [1]))
    speedup.speedup_model()
    (kept,) = speedup.report.kept
    assert kept.units == (1,)
    assert "sort" in kept.reason.text


def test_claims_of_probes_are_listed(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that carries claims shows them, once for alike ones."""
    from maskprop.infer.sweep import Inference

    rule = Inference.rule

    def claiming(self: Inference, node: torch.fx.Node) -> object:
        found = copy.copy(rule(self, node))
        if "relu" in str(node.target):
            found.claims = "axis 1 follows axis 1"  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(Inference, "rule", claiming)
    speedup = sped_up(ConvNet(), generator)
    assert speedup.report.probes == ["axis 1 follows axis 1"]
    assert "probed        axis 1 follows axis 1" in str(speedup.report)
    assert speedup.report.to_dict()["probes"] == ["axis 1 follows axis 1"]


class Auxiliary(nn.Module):
    """A head that only training runs, a layer whose weight is read without calling it, and one that nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(3, 3)
        self.aux, self.old = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        if self.training:
            return self.b(x) + self.aux(x)
        return nn.functional.linear(self.b(x), self.read.weight)


def test_modules_that_evaluation_does_not_run_are_named(generator: torch.Generator) -> None:
    model = randomise(Auxiliary(), generator)
    speedup = ModelSpeedup(model, torch.randn(2, 4, generator=generator), rows(model, "a", [1, 2]))
    speedup.speedup_model()
    assert (model.b.in_features, model.aux[0].in_features, model.old.in_features) == (6, 6, 8)
    assert speedup.report.auxiliary == ["aux"] == speedup.report.to_dict()["auxiliary"]
    assert speedup.report.idle == ["old"] == speedup.report.to_dict()["idle"]
    assert "training      'aux'" in str(speedup.report)
    assert "not run       'old'" in str(speedup.report)
