"""Attributes that hold a size or a number which the plan changes.

Where the replay differs, the wanted and the dense values of the op at fault are known; an attribute of the module, of
one around it, or of a helper inside it that equals the dense value is a candidate for the wanted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from maskprop.align.constants import number_at
from maskprop.align.plan import AttributeChange
from maskprop.graph.graph import Graph
from maskprop.graph.paths import lineage
from maskprop.modules import modules_by_path
from maskprop.rewrite.apply import CONFIGS
from maskprop.rewrite.authored import names_read
from maskprop.rewrite.mismatch import Mismatch
from maskprop.rewrite.patched import patched_settings
from maskprop.rewrite.replay import Replay


@dataclass(frozen=True)
class _Size:
    """A size that changed in a module's ``position``-th op: its input or result ``value``, axis ``axis``."""

    path: str
    position: int
    value: int
    axis: int
    old: int
    new: int

    def at(self, replay: Replay, path: str) -> _Size | None:
        """The same size in another module, if it changed there, too."""
        ops = replay.ops_of(path)
        if self.position >= len(ops):
            return None
        pairs = list(_sizes(replay, ops[self.position], path, self.position))
        return next((p for p in pairs if p.value == self.value and p.axis == self.axis), None)


@dataclass(frozen=True)
class _Number:
    """A number among the arguments of a module's ``position``-th op."""

    path: str
    position: int
    old: float
    new: float

    def at(self, replay: Replay, path: str) -> _Number | None:
        """The same number in another module, if it changed there, too."""
        ops = replay.ops_of(path)
        found = replay.alignment.numbers.get(ops[self.position]) if self.position < len(ops) else None
        if found is None:
            return None
        old = number_at(ops[self.position], found[0])
        return None if old == found[1] else _Number(path, self.position, old, found[1])


@dataclass(frozen=True)
class Candidate:
    """An attribute with its old and new value, and the size or number that it seems to hold."""

    path: str
    attribute: str
    old: Any
    new: Any
    size: _Size | _Number

    @property
    def place(self) -> tuple[str, str]:
        """The module and the attribute."""
        return self.path, self.attribute


def candidates_for(model: nn.Module, graph: Graph, replay: Replay, mismatch: Mismatch) -> list[Candidate]:
    """Attributes of the module at fault and its ancestors that equal a size which changed.

    Those come first that anything but a constructor names: the others are hardly ever read.
    """
    found = list(_candidates(model, graph, replay, mismatch)) if mismatch.op is not None else []
    named = {path: names_read(type(model.get_submodule(path))) for path in {c.path for c in found}}
    return sorted(found, key=lambda c: not named[c.path].issuperset(c.attribute.split(".")))


def _candidates(model: nn.Module, graph: Graph, replay: Replay, mismatch: Mismatch) -> Iterator[Candidate]:
    seen: set[tuple[str, str, float]] = set()
    sizes: list[_Size | _Number] = [*_changed_number(replay, mismatch), *_changed_sizes(replay, mismatch)]
    for path in [*lineage(mismatch.path), *_helpers(model, graph, mismatch.path)]:
        module = model.get_submodule(path)
        for size in sizes:
            for name, value in _attributes(module):
                new = _replaced(name, value, size.old, size.new)
                if new is not None and not name.startswith("__") and (path, name, size.new) not in seen:
                    seen.add((path, name, size.new))
                    yield Candidate(path, name, value, new, size)


def _helpers(model: nn.Module, graph: Graph, path: str) -> list[str]:
    """Modules below one that are never called: what they do counts as done by it."""
    dot = path + "." if path else ""
    below = (dot + name for name, _ in model.get_submodule(path).named_modules() if name)
    return [name for name in below if name not in graph.calls]


def everywhere(model: nn.Module, replay: Replay, candidate: Candidate) -> list[AttributeChange]:
    """The change, and the same change in the other modules of the class, each with its own size."""
    kind = type(model.get_submodule(candidate.path))
    changes = [AttributeChange(candidate.path, candidate.attribute, candidate.old, candidate.new)]
    if not (candidate.size.path + ".").startswith(candidate.path + "." if candidate.path else ""):
        return changes
    below = candidate.size.path.removeprefix(candidate.path)
    for path, module in modules_by_path(model).items():
        if (
            type(module) is not kind
            or path == candidate.path
            or dict(_attributes(module)).get(candidate.attribute) != candidate.old
        ):
            continue
        size = candidate.size.at(replay, path + below if path else below.lstrip("."))
        if size is not None:
            new = _replaced(candidate.attribute, candidate.old, size.old, size.new)
            if new is not None:
                changes.append(AttributeChange(path, candidate.attribute, candidate.old, new))
    return changes


def _changed_number(replay: Replay, mismatch: Mismatch) -> Iterator[_Number]:
    """The number that the op at fault adds, if the plan changes it."""
    node = mismatch.op
    position = None if node is None else replay.position(node)
    if node is not None and position is not None and node in replay.alignment.numbers:
        at, new = replay.alignment.numbers[node]
        yield _Number(str(node.meta["path"]), position, number_at(node, at), new)


def _changed_sizes(replay: Replay, mismatch: Mismatch) -> Iterator[_Size]:
    """Sizes that changed: at the op at fault first, then at the other ops of its module."""
    assert mismatch.op is not None
    path, first = str(mismatch.op.meta["path"]), replay.position(mismatch.op)
    ops = replay.ops_of(path)
    order = [first] if first is not None else []
    order += [i for i in range(len(ops)) if i != first]
    seen: set[tuple[int, int]] = set()
    for i in order:
        for size in _sizes(replay, ops[i], path, i):
            if (size.old, size.new) not in seen:
                seen.add((size.old, size.new))
                yield size


def _sizes(replay: Replay, node: fx.Node, path: str, position: int) -> Iterator[_Size]:
    for value, (dense, compact) in enumerate(replay.around(node)):
        for axis, (old, new) in enumerate(zip(dense or (), compact or (), strict=False)):
            if old != new:
                yield _Size(path, position, value, axis, old, new)


def _replaced(name: str, value: Any, old: float, new: float) -> Any:
    """The attribute's value with the old size replaced, or ``None`` if it does not hold it."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return int(new) if value == old else None
    if isinstance(value, float):  # kernels round numbers to the tensor's type
        return value * (new / old) if old and math.isclose(value, old, rel_tol=1e-6) else None
    if value is None:
        return new if isinstance(new, float) and name == "eps" else None
    if (
        isinstance(value, (tuple, list))
        and type(value) in (tuple, list)
        and all(isinstance(v, int) for v in value)
        and old in value
    ):
        return type(value)(new if v == old else v for v in value)
    return None


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's own attributes, and those of a config object that it holds, as ``config.name``."""
    settings = patched_settings(type(module))
    for name, value in list(vars(module).items()):
        yield name, value
        if name in CONFIGS and not isinstance(value, (nn.Module, dict, type)) and hasattr(value, "__dict__"):
            for key, one in list(vars(value).items()):
                yield f"{name}.{key}", settings.get(f"{name}.{key}", one)
