"""Steps: what movement ops are made of.

A step moves any tensor that is broadcastable over the value, so one implementation serves known masks, values and
labels; ``back`` sends needed elements the other way. Only a reshape that splits or merges axes makes new labels, see
:mod:`maskprop.infer.rules.reshaping`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskprop.infer.coupling import Axis, Coupling, Labels, moved
from maskprop.infer.facts import Fact, reduce_to, spread
from maskprop.infer.rules.reshaping import Shape, axis_groups, couple_reshape, folded_back, reshape


class Step:
    """One movement from a value of shape ``src`` to one of shape ``dst``."""

    src: Shape
    dst: Shape

    def move(self, t: Tensor) -> Tensor:
        """Apply to a tensor broadcastable over ``src``."""
        raise NotImplementedError

    def back(self, t: Tensor) -> Tensor:
        """For a bool broadcastable over ``dst``: which source elements land on a true one."""
        raise NotImplementedError

    def couple(self, labels: Labels, c: Coupling) -> Labels:
        raise NotImplementedError


@dataclass(frozen=True)
class Permute(Step):
    """Axes in another order."""

    src: Shape
    order: Shape

    @property
    def dst(self) -> Shape:  # type: ignore[override]
        return tuple(self.src[d] for d in self.order)

    def move(self, t: Tensor) -> Tensor:
        return t.permute(self.order)

    def back(self, t: Tensor) -> Tensor:
        return t.permute([self.order.index(d) for d in range(len(self.order))])

    def couple(self, labels: Labels, c: Coupling) -> Labels:
        return [moved(labels[d], self.move) for d in self.order]


@dataclass(frozen=True)
class Reshape(Step):
    """The same elements in order, other axes."""

    src: Shape
    dst: Shape

    def move(self, t: Tensor) -> Tensor:
        return folded_back(reshape(t, self.src, self.dst), self.src, self.dst)

    def back(self, t: Tensor) -> Tensor:
        return folded_back(reshape(t, self.dst, self.src), self.dst, self.src)

    def couple(self, labels: Labels, c: Coupling) -> Labels:
        if all(a is None for a in labels):
            return [None] * len(self.dst)
        if 0 in self.src:
            return self._couple_empty(labels)
        return couple_reshape(labels, self.src, self.dst, c)

    def _couple_empty(self, labels: Labels) -> Labels:
        """Of a value without elements: the axes before and behind the first of size 0 that stay as they are."""
        out: Labels = [None] * len(self.dst)
        left, right = ([(i, n) for i, n in enumerate(shape) if n != 1] for shape in (self.src, self.dst))
        for pairs in (zip(left, right, strict=False), zip(left[::-1], right[::-1], strict=False)):
            for (i, n), (j, m) in itertools.takewhile(lambda pair: pair[0][1] == pair[1][1] != 0, pairs):
                a = labels[i]
                if a is not None and a.numel() == n:
                    out[j] = a.reshape([m if axis == j else 1 for axis in range(len(self.dst))])
        return out


@dataclass(frozen=True)
class Expand(Step):
    """Axes of size 1 repeated."""

    src: Shape
    dst: Shape
    merges_next: bool = False

    def move(self, t: Tensor) -> Tensor:
        return t.reshape((1,) * (len(self.dst) - t.ndim) + t.shape)

    def back(self, t: Tensor) -> Tensor:
        return reduce_to(t, self.src)

    def couple(self, labels: Labels, c: Coupling) -> Labels:
        lead = len(self.dst) - len(self.src)
        out: Labels = [*[None] * lead, *(moved(a, self.move) for a in labels)]
        for axis, n in enumerate(self.dst):
            grows = n > 1 and (axis < lead or self.src[axis - lead] == 1)
            if not grows or (self.merges_next and axis == 0):
                continue
            if not self.merges_next:  # equal elements: as free as what they meet
                out[axis] = c.fresh([n if i == axis else 1 for i in range(len(self.dst))])
                continue
            # copies inside a labelled axis (the query heads of a key-value head) may leave one by one
            before = out[axis - 1]
            if before is None and self.dst[axis - 1] != 1 and axis > 1:
                continue
            sizes = [1] * len(self.dst) if before is None else list(before.shape)
            sizes[axis] = n
            out[axis] = c.fresh(sizes)
            c.regular(out, axis)
        return out


@dataclass(frozen=True)
class Slice(Step):
    """A part of an axis.

    Its bounds follow the units before them; whether ``forward`` can express that, the replay tells. Where it cannot,
    halves stay halves, since their bounds are usually computed from the size. What is empty may hold anything of the
    axis for an input of another size.
    """

    src: Shape
    dim: int
    start: int
    stop: int
    step: int = 1
    pins: str = ""

    @property
    def dst(self) -> Shape:  # type: ignore[override]
        length = max(0, -(-(self.stop - self.start) // self.step))
        return (*self.src[: self.dim], length, *self.src[self.dim + 1 :])

    @property
    def index(self) -> tuple[slice, ...]:
        """Where the slice is, for indexing a tensor of full size along the axis."""
        return (*[slice(None)] * self.dim, slice(self.start, self.stop, self.step))

    def move(self, t: Tensor) -> Tensor:
        if t.shape[self.dim] > 1 and self._is_empty and t.dtype == torch.bool:
            return t.all(self.dim, keepdim=True)
        return t if t.shape[self.dim] == 1 else t[self.index]

    def back(self, t: Tensor) -> Tensor:
        if self.dst == self.src:
            return t
        if self._is_empty:
            return t.any(self.dim, keepdim=True)
        shape = list(t.shape)
        shape[self.dim] = self.src[self.dim]
        out = torch.zeros(shape, dtype=torch.bool)
        out[self.index] = t
        return out

    def couple(self, labels: Labels, c: Coupling) -> Labels:
        dim, size = self.dim, self.src[self.dim]
        if self.dst == self.src:
            return labels
        if self._is_regular:
            return self._couple_regular(labels, c)
        if self.pins or self.step != 1:
            c.pin(labels[dim], self.pins or f"is cut at {self.start}:{self.stop}:{self.step} of {size}")
        elif (
            not (self._is_half and c.chunks(labels, dim, 2)) and self.start
        ):  # of a ragged axis, the slice starts after as many units everywhere
            before = Slice(self.src, dim, 0, self.start)
            c.regular([moved(a, before.move) for a in labels], dim)
        return self._moved(labels, c)

    def _couple_regular(self, labels: Labels, c: Coupling) -> Labels:
        """Runs of ``step`` units stay or leave as a whole, and those that stay are in step."""
        dim, size = self.dim, self.src[self.dim]
        runs = (*self.src[:dim], size // self.step, self.step, *self.src[dim + 1 :])
        apart = Reshape(self.src, runs).couple(labels, c)
        c.pin(apart[dim + 1], f"is one of {self.step} that are read in turn")
        one = Slice(runs, dim + 1, self.start, self.start + 1)
        return [moved(a, lambda t: one.move(t).squeeze(dim + 1)) for i, a in enumerate(apart) if i != dim + 1]

    @property
    def _is_regular(self) -> bool:
        """Whether it takes one unit of each run of ``step``."""
        whole, rest = divmod(self.src[self.dim], self.step)
        return self.step > 1 and not rest and self.start < self.step and self.dst[self.dim] == whole

    @property
    def _is_empty(self) -> bool:
        return self.dst[self.dim] == 0

    @property
    def _is_half(self) -> bool:
        middle, odd = divmod(self.src[self.dim], 2)
        return not odd and (self.start, self.stop) in ((0, middle), (middle, 2 * middle))

    def _moved(self, labels: Labels, c: Coupling) -> Labels:
        out = [moved(a, self.move) for a in labels]
        part = out[self.dim]
        if part is not None:
            c.nonempty.append(Axis(tuple(out), self.dim))
            c.regular(out, self.dim)
        return out


@dataclass(frozen=True)
class Part(Slice):
    """A part of a split: its bounds follow the split's sizes. ``parts`` equal ones, or 0 if they differ."""

    parts: int = 0

    def couple(self, labels: Labels, c: Coupling) -> Labels:
        if self.parts and self.start == 0:
            c.chunks(labels, self.dim, self.parts)
        return self._moved(labels, c)


@dataclass(frozen=True)
class Pick(Step):
    """Units at constant places of an axis. Those stay, and so do the units that their places are counted past."""

    src: Shape
    dim: int
    places: Shape

    @property
    def dst(self) -> Shape:  # type: ignore[override]
        return (*self.src[: self.dim], len(self.places), *self.src[self.dim + 1 :])

    def move(self, t: Tensor) -> Tensor:
        return t if t.shape[self.dim] == 1 else t.index_select(self.dim, torch.tensor(self._indices))

    def back(self, t: Tensor) -> Tensor:
        shape = list(t.shape)
        shape[self.dim] = self.src[self.dim]
        out = torch.zeros(shape, dtype=torch.bool)
        for i, place in enumerate(self._indices):
            out.select(self.dim, place).logical_or_(t.select(self.dim, i if t.shape[self.dim] > 1 else 0))
        return out

    def couple(self, labels: Labels, c: Coupling) -> Labels:
        own, before = labels[self.dim], 1 + max(self.places)
        for start, count in ((0, before), (min(self.places), -min(self.places))):
            if own is not None and count > 0:
                c.pin(
                    own.narrow(self.dim, start, count), "is looked up at a constant place, or counted on the way there"
                )
        return [None if i == self.dim else moved(a, self.move) for i, a in enumerate(labels)]

    @property
    def _indices(self) -> list[int]:
        return [place % self.src[self.dim] for place in self.places]


@dataclass(frozen=True)
class Roll(Step):
    """Reorder along axes: roll and flip (``mirrors``), which turns what stays round as it turns all."""

    src: Shape
    dims: Shape
    fn: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    mirrors: bool = False

    @property
    def dst(self) -> Shape:  # type: ignore[override]
        return self.src

    def _full(self, t: Tensor) -> Tensor:
        varying = [d for d in self.dims if t.shape[d] > 1]
        return spread(t, self.dims, self.src) if varying and not self.mirrors else t

    def move(self, t: Tensor) -> Tensor:
        return self.fn(self._full(t))

    def back(self, t: Tensor) -> Tensor:
        return self.inverse(self._full(t))

    def couple(self, labels: Labels, c: Coupling) -> Labels:
        if self.mirrors:
            return [moved(a, self.move) for a in labels]
        for d in self.dims:
            c.pin(labels[d], "is rolled along this axis")
        return [None if i in self.dims else moved(a, self.move) for i, a in enumerate(labels)]


def move_fact(fact: Fact, steps: Sequence[Step]) -> Fact:
    """A fact through a chain of steps."""

    def through(t: Tensor) -> Tensor:
        for step in steps:
            t = step.move(t)
        return t

    rows = fact.row_axis
    for step in steps if rows is not None else ():
        rows = _row_axis(step, rows)
    if fact.nothing:
        return Fact.unknown(len(steps[-1].dst) if steps else fact.known.ndim, rows)
    known = through(fact.known)
    return Fact(known, through(fact.zero), lambda: through(fact.value()), fact.plain, rows, fact.again)


def _row_axis(step: Step, axis: int | None) -> int | None:
    """Where the axis whose elements sum to one goes."""
    if axis is None:
        return None
    if isinstance(step, (Slice, Pick, Roll)):
        touched = step.dims if isinstance(step, Roll) else (step.dim,)
        return None if axis in touched else axis
    if isinstance(step, Permute):
        return step.order.index(axis)
    if isinstance(step, Expand):
        return axis + len(step.dst) - len(step.src)
    for ins, outs in axis_groups(step.src, step.dst):
        if ins == [axis] and len(outs) == 1:
            return outs[0]
    return None


def move_back(needed: Tensor, steps: Sequence[Step]) -> Tensor:
    """Needed elements back through a chain of steps."""
    for step in reversed(steps):
        needed = step.back(needed)
    return needed
