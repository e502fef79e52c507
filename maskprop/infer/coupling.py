"""Labels and the relations between them: the units that must leave together.

Every value carries, per axis, a *label array* (int64, broadcastable over the value, of full size along its own
axis) or ``None`` for an axis that never shrinks. An array may vary along other axes too: that is raggedness, for
example heads ``(1, H, 1, 1)`` and their dims ``(1, H, 1, D)``. An element leaves if any of its axes' labels leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor, fx

from maskprop.graph.graph import shape_of
from maskprop.infer.facts import Fact, broadcast_shape, everywhere
from maskprop.infer.op import Op
from maskprop.infer.places import ScalePlace, calls_alike

Labels = list["Tensor | None"]
# An operand of a node that is cut along one of its axes as it enters: node name, input, axis from the last.
Cut = tuple[str, int, int]


@dataclass(frozen=True)
class Pin:
    """These labels stay.

    Attributes:
        labels: an array of them.
        reason: completes "the unit ...".
        node: name of the fx node that pins them.
        live: only because these units are read; with other masks they might go. A structural pin holds under
            every mask.
    """

    labels: Tensor
    reason: str
    node: str
    live: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis of a value, among the labels of all its axes: their removed positions do not count."""

    labels: tuple[Tensor | None, ...]
    axis: int


@dataclass(frozen=True)
class Contraction:
    """An op that sums over ``labels``: what may leave there, and what it leaves behind.

    Attributes:
        op: the consumer.
        labels: of the summed axis, 1-D.
        constant: float64, 1-D or ``(units, *map)``: what unit i shows the consumer where it is known and not zero.
        nonzero: bool, 1-D: units whose constant must be accounted for when they leave.
        place: ``"bias"``, ``"carrier"``, or ``"both"``: each map is a multiple of the carrier's and a number besides.
        groups: of a grouped convolution; each group of units needs a carrier of its own.
    """

    op: Op
    labels: Tensor
    constant: Tensor
    nonzero: Tensor
    place: str
    groups: int = 1

    @property
    def maps(self) -> Tensor:
        """``(units, positions)``: what a carrier is in proportion to; zeros of what is uniform up to rounding."""
        maps = self.constant.reshape(len(self.constant), -1)
        if self.place != "both":
            return maps
        besides, largest = maps - maps.mean(1, keepdim=True), maps.abs().amax(1, keepdim=True)
        return torch.where(besides.abs().amax(1, keepdim=True) > 1e-12 * largest, besides, 0.0)


@dataclass(frozen=True)
class Rescale:
    """A mean of squares whose removed units are zeros, and what makes up for their number.

    With C units kept as C', the mean grows by ``C / C'``. What is added to it (``eps``) grows alike, and the weight
    that the normalised value meets takes the rest.

    Attributes:
        labels: of the value that it is taken of, an array an axis.
        axis: the one that it is over.
        place: what takes the factor.
    """

    labels: Labels
    axis: int
    place: ScalePlace


@dataclass(frozen=True)
class Count:
    """A number among an op's arguments that says how many units there are, where no size does.

    Attributes:
        node: the op.
        position: of the argument.
        labels: of the units, 1-D.
    """

    node: fx.Node
    position: int
    labels: Tensor


@dataclass
class Coupling:
    """Collects relations while the graph is walked.

    Attributes:
        size: number of labels so far.
        edges: pairs of label arrays that are equal.
        rescales: means over axes that may shrink.
        counts: numbers that count units.
        read: labels of summed axes. What no sum ever reads stays: this input does not show what it is for.
        regulars: axes along which every kept position of the others must keep equally many units.
        nonempty: axes that may not lose all their units (parts of a cut axis).
        multiples: label arrays of axes that must keep a multiple of some number of units.
        cuts: operands that lose units only as they enter an op, and keep them elsewhere.
        cuttable: of all operands that could, the labels where they come from, and those of what they meet.
        even: names of nodes whose equal parts must stay equal.
        uneven: names of nodes that cut an axis into equal parts which may become unequal.
        triples: ``(row, outer, inner)``: a row leaves exactly if its outer or its inner unit leaves.
        factors: of each triple, into how many outer and inner units the axis is taken apart.
    """

    constants: str = "exact"
    cuts: frozenset[Cut] = frozenset()
    cuttable: dict[Cut, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    even: frozenset[str] = frozenset()
    uneven: set[str] = field(default_factory=set)
    size: int = 0
    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    triples: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    factors: list[tuple[int, int]] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    regulars: list[Axis] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    rescales: list[Rescale] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)
    nonempty: list[Axis] = field(default_factory=list)
    multiples: list[tuple[Tensor, int]] = field(default_factory=list)
    node: str = ""
    facts: dict[fx.Node, Any] = field(default_factory=dict)
    needed: dict[fx.Node, Any] = field(default_factory=dict)
    labels: dict[fx.Node, Any] = field(default_factory=dict)
    _bound: set[tuple[fx.Node, int]] = field(default_factory=set)

    # -- what a rule may ask --------------------------------------------------------------------

    def facts_of(self, op: Op) -> list[Fact]:
        """Facts of the op's inputs."""
        return [self.facts[n] for n in op.inputs]

    def needed_of(self, op: Op) -> Tensor:
        """Which elements of the op's (first) result some output depends on."""
        found = self.needed.get(op.node)
        if found is None:
            return everywhere(False, len(op.results[0].shape))  # type: ignore[union-attr]
        first: Tensor = found[0] if op.several else found
        return first

    def matters(self, op: Op) -> bool:
        """Whether some output depends on any result of the op."""
        found = self.needed.get(op.node)
        return found is not None and any(bool(n.any()) for n in (found if op.several else [found]))

    def labels_of(self, node: fx.Node) -> Labels:
        """Labels of a value; the model's own tensors get theirs when they are first asked for."""
        if node not in self.labels:
            self.labels[node] = self.axes(shape_of(node))
        found: Labels = self.labels[node]
        return found

    def bind(self, node: fx.Node, axis: int, labels: Tensor | None) -> None:
        """Let an axis of a value leave with ``labels``: a parameter takes them as its own if nothing has read it yet.

        They may vary along other axes of it, and need not be tied to labels of its own.
        """
        ndim = len(shape_of(node))
        first = node.op == "get_attr" and next(iter(node.users)).name == self.node and (node, axis) not in self._bound
        if labels is not None:
            labels = labels.reshape(labels.shape + (1,) * (ndim - labels.ndim))
        if first and labels is not None:
            if ndim == 1:
                self.labels[node] = [labels]
            else:
                self.labels_of(node)[axis] = labels
            self._bound.add((node, axis))
        else:
            self.equal(self.labels_of(node)[axis], labels)

    # -- what a rule may state ------------------------------------------------------------------

    def fresh(self, shape: Sequence[int]) -> Tensor:
        """New labels, one an element."""
        count = 1
        for n in shape:
            count *= n
        labels = torch.arange(self.size, self.size + count).reshape(tuple(shape))
        self.size += count
        return labels

    def axes(self, shape: Sequence[int]) -> Labels:
        """New labels for every axis of a value; an axis of one unit takes none."""
        return [
            self.fresh([n if i == axis else 1 for i in range(len(shape))]) if n > 1 else None
            for axis, n in enumerate(shape)
        ]

    def equal(
        self, a: Tensor | None, b: Tensor | None, reason: str = "meets an axis that cannot shrink"
    ) -> Tensor | None:
        """``a`` and ``b`` (broadcast against each other) leave together; an axis that never shrinks pins the other."""
        if a is None or b is None:
            self.pin(a, reason)
            self.pin(b, reason)
            return None
        if a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()):
            return a
        self.edges.append((a, b))
        return a

    def pin(self, labels: Tensor | None, reason: str, *, live: bool = False) -> None:
        """State that these labels stay."""
        if labels is not None and labels.numel():
            self.pins.append(Pin(labels, reason, self.node, live))

    def pin_all(self, labels: Sequence[Tensor | None], reason: str) -> None:
        """Pin several arrays."""
        for array in labels:
            self.pin(array, reason)

    def end(self, labels: Tensor, live: Tensor, reason: str) -> None:
        """The labels end here, at a sum: those that are ``live`` (broadcast against them) stay under these masks."""
        self.read.append(labels)
        shape = broadcast_shape(live.shape, labels.shape)
        self.pin(labels.expand(shape)[live.expand(shape)], reason, live=True)

    def leave(self, new: Contraction) -> None:
        """Units may leave constants here; calls of one weight leave them once."""
        calls = calls_alike(new.op.node)
        for i, old in enumerate(self.contractions if len(calls) > 1 else ()):
            if old.op.node in calls:
                constant = torch.where(old.nonzero, old.constant, new.constant)
                self.contractions[i] = replace(old, constant=constant, nonzero=old.nonzero | new.nonzero)
                return
        self.contractions.append(new)

    def mean_of_squares(self, labels: Labels, axis: int, live: Tensor, place: ScalePlace | None) -> bool:
        """Zeros (what is not ``live``) may leave a mean over ``axis`` if ``place`` makes up for their number.

        One weight serves all heads, whose units then leave together; unless it has an element for each unit of each.

        Returns:
            Whether they may: the labels are pinned otherwise.
        """
        axis %= len(labels)
        own = labels[axis]
        if own is None:
            return False
        if place is None:
            self.pin(own, "is averaged over")
            return False
        if own.numel() != math.prod(shape_of(place.weight)):
            own = self.uniform(own, [d for d in range(own.ndim) if d != axis])
            assert own is not None
        self.end(own, live, "is averaged here")
        self.rescales.append(Rescale([own if d == axis else other for d, other in enumerate(labels)], axis, place))
        return True

    def triple(self, row: Tensor, outer: Tensor, inner: Tensor, factors: tuple[int, int]) -> None:
        """State ``row = outer or inner`` of an axis of so many outer times so many inner units."""
        self.triples.append((row, outer, inner))
        self.factors.append(factors)

    def multiple(self, labels: Tensor, of: int) -> None:
        """State that the axis keeps a multiple of ``of`` units."""
        self.multiples.append((labels, of))

    def uniform(self, labels: Tensor | None, axes: Sequence[int]) -> Tensor | None:
        """Tie the labels over ``axes`` (other axes than their own), which then stop varying there."""
        if labels is None:
            return None
        for axis in axes:
            if labels.shape[axis] > 1:
                first = labels.narrow(axis, 0, 1)
                self.equal(labels, first)
                labels = first
        return labels

    def chunks(self, labels: Sequence[Tensor | None], axis: int, count: int) -> bool:
        """The axis is cut into ``count`` equal parts: each must keep equally many units, if this node is :attr:`even`.

        Returns:
            Whether they must.
        """
        if labels[axis] is None or count <= 1:
            return True
        if self.node not in self.even:
            self.uneven.add(self.node)
            return False

        def cut(a: Tensor) -> Tensor:
            return a.unflatten(axis, (count, -1)) if a.shape[axis] > 1 else a.unsqueeze(axis)

        parts = [moved(a, cut) for a in labels]
        self.regulars.append(Axis((*parts[:axis], None, *parts[axis:]), axis + 1))
        return True

    def regular(self, labels: Sequence[Tensor | None], axis: int) -> None:
        """A ragged axis: at every kept position of the other axes it keeps equally many units."""
        own = labels[axis]
        if own is not None and own.numel() > own.shape[axis]:
            self.regulars.append(Axis(tuple(labels), axis))


def owned_axes(tensors: Iterable[Labels]) -> list[Axis]:
    """The axes of tensors that can shrink, by the labels of each tensor."""
    return [Axis(tuple(labels), i) for labels in tensors for i, own in enumerate(labels) if own is not None]


class LabelsOf(Sequence[Labels]):
    """Labels of several values, of each only when it is asked for: a vector may be bound to others' instead."""

    def __init__(self, nodes: Sequence[fx.Node], c: Coupling) -> None:
        self._nodes, self._coupling = nodes, c

    @overload
    def __getitem__(self, at: int) -> Labels: ...

    @overload
    def __getitem__(self, at: slice) -> list[Labels]: ...

    def __getitem__(self, at: int | slice) -> Labels | list[Labels]:
        if isinstance(at, slice):
            return [self._coupling.labels_of(node) for node in self._nodes[at]]
        return self._coupling.labels_of(self._nodes[at])

    def __len__(self) -> int:
        return len(self._nodes)


def moved(array: Tensor | None, move: Callable[[Tensor], Tensor]) -> Tensor | None:
    """A label array through a movement; an axis that never shrinks has none."""
    return None if array is None else move(array)
