"""What a speedup did: sizes, what left, what stayed and why, how it was rewritten, and the proof."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from maskprop.align.plan import Plan
from maskprop.explain import Explainer
from maskprop.modules import modules_by_path
from maskprop.reasons import Kept
from maskprop.rewrite.repair import Repair
from maskprop.rewrite.steps import ModuleChange, Snapshot, count
from maskprop.rewrite.training import idle_modules
from maskprop.rewrite.verify import Check
from maskprop.view.costs import count_flops, dense_shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Layer:
    """A module that owns parameters, before and after.

    Attributes:
        path: of the module.
        kind: its class.
        before, after: shape of its weight (or its first parameter).
        parameters_before, parameters_after: elements of its own parameters.
    """

    path: str
    kind: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    parameters_before: int
    parameters_after: int

    @property
    def _axis(self) -> int:
        return 1 if self.kind.startswith("ConvTranspose") else 0

    @property
    def width_before(self) -> int:
        """Units along the axis of its outputs."""
        return self.before[self._axis] if self.before else 1

    @property
    def width_after(self) -> int:
        """Units that are left there."""
        return self.after[self._axis] if self.after else 1


@dataclass(frozen=True)
class Change:
    """A module attribute that was set, with its value before and after."""

    module: str
    attribute: str
    before: Any
    after: Any


@dataclass
class Report:
    """Filled by a speedup; what is costly to tell (operations, reasons) is worked out when it is asked for.

    Attributes:
        seconds: by stage.
        plan: which units stay, what is folded where.
        check: the comparison with the masked model, if there was one.
        repair: how the model's forward was made to follow the plan.
        model: class of the model.
        parameters, bytes: before and after; bytes of parameters and persistent buffers.
        layers: modules that own parameters.
        changes: module attributes that were set.
        sweeps: rounds of inference until nothing changed.
        solves: rounds of the solver until every shape was regular.
        rules: how many ops each kind of rule served.
        opaque: ops that nothing is known about, so that the units they read were kept, with their modules.
        probes: what the numeric probe claims of each op that has no rule.
        auxiliary: modules with parameters that only training runs, cut to the units that stay.
        idle: those that neither pass ran, or that could not follow. They keep their sizes, though what they are
            handed may have fewer units now.
        concrete: whether real values were needed to trace: the branches taken are then those of the dummy
            input.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    plan: Plan | None = None
    check: Check | None = None
    repair: Repair | None = None
    model: str = ""
    parameters: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    layers: list[Layer] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    sweeps: int = 0
    solves: int = 0
    rules: dict[str, int] = field(default_factory=dict)
    opaque: dict[str, list[str]] = field(default_factory=dict)
    probes: list[str] = field(default_factory=list)
    auxiliary: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    concrete: bool = False
    explainer: Explainer | None = field(default=None, repr=False, compare=False)

    def fill(
        self,
        before: Snapshot,
        changes: Mapping[str, ModuleChange],
        model: nn.Module,
        explainer: Explainer,
        repair: Repair,
    ) -> None:
        """Take what is cheap to tell from the stages' results."""
        inference, alignment = explainer.inference, explainer.alignment
        self.explainer, self.repair, self.plan = explainer, repair, alignment.plan
        self.model = type(model).__name__
        modules = modules_by_path(model)
        parameters, size = count(modules)
        self.parameters, self.bytes = (before.parameters, parameters), (before.bytes, size)
        self.layers = list(_layers(before, modules))
        self.changes = [
            Change(path, name, old, new)
            for path, change in changes.items()
            for name, (old, new) in change.attributes.items()
        ]
        self.sweeps, self.solves = inference.facts.sweeps, alignment.solution.rounds
        self.rules = dict(inference.facts.rules)
        self.auxiliary = list(repair.auxiliary)
        self.idle = [p for p in idle_modules(model, inference.graph) if p not in self.auxiliary]
        self.concrete = inference.graph.concrete
        claims = (getattr(inference.rule(node), "claims", None) for node in inference.graph.ops)
        self.probes = list(dict.fromkeys(str(claim) for claim in claims if claim is not None))
        for op in inference.facts.unruled:
            if any(a is not None for n in op.inputs for a in alignment.coupling.labels_of(n)):
                self.opaque.setdefault(str(op.target), []).append(op.path)

    # -- worked out on demand -------------------------------------------------------------------

    @cached_property
    def flops(self) -> tuple[int, int]:
        """Operations of one forward pass on the dummy input; a multiply-add counts as two."""
        return sum(self.layer_flops[0].values()), sum(self.layer_flops[1].values())

    @cached_property
    def layer_flops(self) -> tuple[dict[str, int], dict[str, int]]:
        """The same by module path."""
        if self.explainer is None:
            return {}, {}
        graph, gone = self.explainer.inference.graph, self.explainer.inference.left
        return count_flops(graph, dense_shape), count_flops(graph, self.explainer.alignment.expected_shape, gone)

    @cached_property
    def kept(self) -> list[Kept]:
        """Units that a mask prunes whole and that stayed, with the reason."""
        return self.explainer.kept() if self.explainer is not None else []

    # -- in words -------------------------------------------------------------------------------

    @property
    def how(self) -> str:
        """How the model was rewritten, in short."""
        if self.repair is None:
            return ""
        parts = ["modules"]
        if self.plan is not None and self.plan.attributes:
            parts.append(f"{len(self.plan.attributes)} attributes")
        for what, paths in (
            ("generated forward", list(self.repair.generated)),
            ("replaced attention", self.repair.replaced),
            ("the user's modules", self.repair.taken),
            ("nothing but a constant left", self.repair.removed),
        ):
            if paths:
                parts.append(f"{what} in {_some(paths)}")
        if self.repair.pinned:
            parts.append(f"units kept after {len(self.repair.pinned)} failed repairs")
        return ", ".join(parts)

    @property
    def reduction(self) -> float:
        """Share of the parameters that is gone."""
        return 1 - self.parameters[1] / self.parameters[0] if self.parameters[0] else 0.0

    def table(self, all_layers: bool = False) -> Table:
        """Sizes, and a row for each layer that changed (or each layer)."""
        table = Table(title=f"{self.model}: {_change(self.parameters)} parameters", box=box.SIMPLE_HEAD)
        for name in ("layer", "kind"):
            table.add_column(name, overflow="fold")
        for name in ("weight before", "after", "parameters", "left"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            if all_layers or layer.before != layer.after or layer.parameters_before != layer.parameters_after:
                share = 1 - layer.parameters_after / layer.parameters_before if layer.parameters_before else 0.0
                table.add_row(
                    layer.path or "(the model)",
                    layer.kind,
                    _by(layer.before),
                    _by(layer.after),
                    f"{layer.parameters_after:,}",
                    f"{share:.0%}",
                )
        return table

    def lines(self) -> list[str]:
        """The summary, a line a fact."""
        if self.plan is None:
            return ["No speedup has run yet."]
        by_kind = sorted(self.rules.items(), key=lambda item: -item[1])
        lines = [
            f"parameters    {_change(self.parameters)}",
            f"bytes         {_change(self.bytes)}",
            f"FLOPs         {_change(self.flops)}",
            f"rewritten     {self.how}",
            f"inference     sweeps: {self.sweeps}, solves: {self.solves}",
            f"rules         {', '.join(f'{n} {kind}' for kind, n in by_kind)}",
            f"seconds       {', '.join(f'{stage} {s:.3f}' for stage, s in self.seconds.items())}",
        ]
        if self.check is not None:
            verdict = "passed" if self.check.passed else "FAILED"
            lines.append(
                f"verification  {verdict}: relative error {self.check.error:.1e} (tolerance {self.check.tolerance:.0e})"
            )
        else:
            lines.append("verification  switched off")
        if self.concrete:
            lines.append(
                "trace         needed the dummy input's values: branches that read a tensor are taken as "
                "that input takes them"
            )
        lines += [
            f"opaque        {op} in {_some(list(dict.fromkeys(paths)))}: what it reads was kept"
            for op, paths in self.opaque.items()
        ]
        lines += [f"probed        {claim}" for claim in self.probes]
        if self.auxiliary:
            lines.append(f"training      {_some(self.auxiliary)}: not evaluated, and cut to the units that stay")
        if self.idle:
            lines.append(f"not run       {_some(self.idle)}: no part of the evaluated model, so its sizes were kept")
        if self.repair is not None:
            lines += [
                f"generated     forward of '{path}', because of {reason}"
                for path, reason in self.repair.generated.items()
            ]
            lines += [f"kept          {reason}" for reason in self.repair.pinned]
        lines += [f"kept          {kept}" for kept in self.kept]
        return lines

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            if self.plan is not None:
                console.print(self.table())
            for line in self.lines():
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        return capture.get()

    # -- elsewhere ------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts."""
        before, after = self.layer_flops
        return {
            "model": self.model,
            "parameters": _pair(self.parameters),
            "bytes": _pair(self.bytes),
            "flops": _pair(self.flops),
            "seconds": dict(self.seconds),
            "sweeps": self.sweeps,
            "solves": self.solves,
            "rules": dict(self.rules),
            "opaque": {op: list(paths) for op, paths in self.opaque.items()},
            "probes": list(self.probes),
            "auxiliary": list(self.auxiliary),
            "idle": list(self.idle),
            "concrete": self.concrete,
            "how": self.how,
            "check": None if self.check is None else {**asdict(self.check), "passed": self.check.passed},
            "layers": [
                {
                    **asdict(layer),
                    "flops_before": before.get(layer.path, 0),
                    "flops_after": after.get(layer.path, 0),
                }
                for layer in self.layers
            ],
            "changes": [asdict(change) for change in self.changes],
            "generated": dict(self.repair.generated) if self.repair else {},
            "replaced": [*self.repair.replaced, *self.repair.taken] if self.repair else [],
            "pinned": list(self.repair.pinned) if self.repair else [],
            "kept": [
                {
                    "parameter": k.parameter,
                    "axis": k.axis,
                    "units": list(k.units),
                    "reason": k.reason.text,
                    "path": list(k.reason.path),
                }
                for k in self.kept
            ],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One page that needs nothing else: widths, the coupling graph, what stayed and why, the check.

        Args:
            path: also write it there.
        """
        from maskprop.view.page import page

        text = page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self) -> Figure:
        """Widths before and after, as a matplotlib figure.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from maskprop.view.figure import figure

        return figure(self)

    def _repr_html_(self) -> str:
        from maskprop.view.page import fragment

        return fragment(self)


def _layers(before: Snapshot, modules: Mapping[str, nn.Module]) -> Iterator[Layer]:
    seen: set[nn.Parameter] = set()
    for path, module in modules.items():
        dot = path + "." if path else ""
        own = {dot + key: p for key, p in module._parameters.items() if p is not None and p not in seen}
        if not own:
            continue
        seen.update(own.values())
        main = next((n for n in own if n.endswith("weight")), next(iter(own)))
        yield Layer(
            path,
            type(module).__name__,
            before.shapes.get(main, ()),
            tuple(own[main].shape),
            sum(math.prod(before.shapes[n]) for n in own if n in before.shapes),
            sum(p.numel() for p in own.values()),
        )


def _pair(values: tuple[int, int]) -> Mapping[str, int]:
    return {"before": values[0], "after": values[1]}


def _change(values: tuple[int, int]) -> str:
    share = f" ({values[1] / values[0] - 1:+.1%})" if values[0] else ""
    return f"{values[0]:,} → {values[1]:,}{share}"


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _some(paths: list[str], limit: int = 2) -> str:
    shown = ", ".join(f"'{p}'" for p in paths[:limit])
    return shown if len(paths) <= limit else f"{shown} and {len(paths) - limit} more"
