"""Facts of units instead of elements: the coupled groups that a value carries, and which are live there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from maskprop.align.align import Alignment
from maskprop.infer.coupling import Pin
from maskprop.infer.facts import Fact, any_over
from maskprop.infer.sweep import Inference

Groups = NDArray[np.int64]
_NONE: Groups = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class ValueUnits:
    """The groups on the axes of one value, sorted.

    Attributes:
        carried: all of them.
        live: those with an element that depends on the model's input.
        nonzero: those with an element that is not a known zero.
        total: nothing in the value depends on the input.
    """

    carried: Groups
    live: Groups
    nonzero: Groups
    total: bool


class UnitFacts:
    """Facts of every group at every value, and a number for each group by which alike groups are told.

    Attributes:
        values: by node.
        pins: of every group that has some.
    """

    def __init__(self, inference: Inference, alignment: Alignment) -> None:
        self._solution = alignment.solution
        self.values: dict[fx.Node, ValueUnits] = {}
        self.pins: dict[int, list[Pin]] = {}
        random = np.random.default_rng(0)
        self._hash = np.zeros(len(self._solution.removed), dtype=np.uint64)
        order = {node: i for i, node in enumerate(inference.graph.fx.nodes)}
        found = alignment.coupling.labels
        for node in sorted(found, key=order.__getitem__):
            units = self._value(found[node], inference.facts.known.get(node))
            self.values[node] = units
            for part in (units.carried, units.live, units.nonzero):
                self._hash[part] ^= random.integers(1 << 63, dtype=np.uint64)
        for pin in alignment.coupling.pins:
            groups = np.unique(self._solution.groups_of(pin.labels))
            self._hash[groups] ^= random.integers(1 << 63, dtype=np.uint64)
            for group in groups.tolist():
                self.pins.setdefault(group, []).append(pin)

    def signature(self, group: int) -> int:
        """Equal for groups at the same values, alike live or known or zero there, with the same pins."""
        return int(self._hash[group])

    def carries(self, node: fx.Node, group: int) -> bool:
        """Whether one of the value's axes has the group."""
        return node in self.values and _contains(self.values[node].carried, group)

    def live(self, node: fx.Node, group: int) -> bool:
        """Whether the group holds, in this value, something that depends on the model's input."""
        return node in self.values and _contains(self.values[node].live, group)

    def nonzero(self, node: fx.Node, group: int) -> bool:
        """Whether the group holds, in this value, something that is not always zero."""
        return node in self.values and _contains(self.values[node].nonzero, group)

    def carriers(self, group: int) -> list[fx.Node]:
        """Values with the group on one of their axes, in order."""
        return [node for node in self.values if self.carries(node, group)]

    def _value(self, labels: Any, fact: Any) -> ValueUnits:
        parts = list(zip(labels, fact, strict=True)) if isinstance(labels, tuple) else [(labels, fact)]
        carried, live, nonzero, total = [], [], [], True
        for arrays, one in parts:
            if not isinstance(one, Fact):
                continue
            total &= one.total
            for array in arrays:
                if array is not None:
                    carried.append(self._groups(array))
                    live.append(self._groups(array, ~one.known))
                    nonzero.append(self._groups(array, ~one.zero))
        return ValueUnits(_union(carried), _union(live), _union(nonzero), total)

    def _groups(self, labels: Tensor, where: Tensor | None = None) -> Groups:
        """Groups of the labels, or of those at which some element is marked."""
        groups = self._solution.groups_of(labels)
        if where is None:
            return np.unique(groups)
        marked = any_over(where, [d for d, n in enumerate(labels.shape) if n == 1])
        shape = torch.broadcast_shapes(labels.shape, marked.shape)
        return np.unique(np.broadcast_to(groups, shape)[marked.expand(shape).numpy()])


def _union(parts: list[Groups]) -> Groups:
    if len(parts) <= 1:
        return parts[0] if parts else _NONE
    return np.unique(np.concatenate(parts))


def _contains(groups: Groups, group: int) -> bool:
    at = int(np.searchsorted(groups, group))
    return at < len(groups) and int(groups[at]) == group


def pins_by_node(pins: list[Pin]) -> Iterator[tuple[str, Pin]]:
    """The first pin at every node."""
    seen: set[str] = set()
    for pin in pins:
        if pin.node not in seen:
            seen.add(pin.node)
            yield pin.node, pin
