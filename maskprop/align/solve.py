"""Decide which labels leave: the greatest set that all relations allow.

Labels that are equal form *coupled groups*, the components of the equality edges. A row of a split or merged axis
leaves exactly if its outer or its inner unit leaves, so ``same row <=> same outer and same inner`` (congruence)
joins further groups. What may leave is then the greatest fixed point of

    may[outer] &= may[row]
    may[inner] &= may[row] | removed[outer] & may[outer]
    removed[row] = removed[outer] | removed[inner]

in which whole outer units (heads) win by themselves. An outer unit may be a row in turn, even of its own triple, and
then excuses its inner ones only while it may leave: else the two would hold each other away for ever. An axis may be
taken apart in several ways (groups before a channel shuffle and groups behind it): a row leaves by all of them or by
none. Whatever breaks a shape is restored, and the solve repeats: it ends because what is removed may leave, and
``may`` only ever falls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskprop.infer.coupling import Axis, Coupling, Labels

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Restore = Callable[["Solution"], Ints]


class Solution:
    """Which coupled groups leave.

    Attributes:
        group: the coupled group of each label.
        may: whether a group may leave.
        removed: whether it does.
        restored: groups that could leave and had to stay for a shape's sake, with the reason.
    """

    def __init__(self, c: Coupling, owned: Sequence[Tensor], alike: bool = False) -> None:
        """Collect what may leave.

        Args:
            c: the relations.
            owned: label arrays of the model's own tensors (others never leave by themselves).
            alike: treat all ways to take an axis apart as one: units are coarser, and leave without others.
        """
        self.coupling = c
        edges = _pairs(c.edges)
        triples = _triples(c)
        self.group = _components(c.size, edges)
        self.group, self.triples = _congruence(self.group, triples[:, 1:] if alike else triples)
        count = int(self.group.max()) + 1 if c.size else 0
        self.may = np.ones(count, dtype=bool)
        self._rows = np.zeros(count, dtype=bool)
        self._rows[self.triples[:, 0]] = True
        self._pin_unowned(owned, count)
        self.may[self.group[_joined([pin.labels for pin in c.pins])]] = False
        self.removed = np.zeros(count, dtype=bool)
        self.restored: dict[int, str] = {}
        self.rounds = 0

    def _pin_unowned(self, owned: Sequence[Tensor], count: int) -> None:
        links = (
            np.concatenate([self.triples[:, [0, 1]], self.triples[:, [0, 2]]])
            if len(self.triples)
            else np.zeros((0, 2), dtype=np.int64)
        )
        family = _components(count, links)
        for arrays in (owned, self.coupling.read):
            some = np.zeros(count, dtype=bool)
            some[family[self.group[_joined(arrays)]]] = True
            self.may &= some[family] if count else self.may

    def groups_of(self, labels: Tensor) -> Ints:
        """Coupled groups of an array of labels, same shape."""
        found: Ints = self.group[labels.numpy()]
        return found

    def leaves(self, labels: Tensor) -> Bools:
        """Whether each label leaves, same shape."""
        found: Bools = self.removed[self.groups_of(labels)]
        return found

    def kept(self, labels: Tensor) -> Tensor:
        """Positions, in the flat order, whose labels stay."""
        return torch.from_numpy(np.flatnonzero(~self.leaves(labels)))

    def kept_units(self, labels: Labels | None) -> list[Bools | None]:
        """Which units of a value stay, an array an axis; empty if all do."""
        if labels is None or all(a is None for a in labels):
            return []
        return [None if a is None else ~self.leaves(a) for a in labels]

    def best(self, labels: Tensor, count: NDArray[np.int64] | int, axis: int = -1) -> Bools:
        """So many of the labels that leave, along an axis: the first, but last those that leave with an outer unit.

        That unit would have to stay with them.
        """
        leaves, taken = self.leaves(labels), np.zeros(tuple(labels.shape), dtype=bool)
        bound = self._bound[self.groups_of(labels)]
        for some in (leaves & ~bound, leaves & bound):
            left = count - taken.sum(axis, keepdims=True)
            taken |= some & (np.cumsum(some, axis) <= left)
        return taken

    @property
    def _bound(self) -> Bools:
        """Groups that leave with an outer unit."""
        row, outer, inner = self.triples.T
        bound = np.zeros(len(self.may), dtype=bool)
        while True:
            before = bound.copy()
            np.logical_or.at(bound, row, self.removed[outer] | bound[inner])
            if np.array_equal(bound, before):
                return bound

    def solve(self, restore: Mapping[str, Restore]) -> None:
        """Find the fixed point, restoring until every check in ``restore`` returns nothing.

        Args:
            restore: by the reason that it gives, functions of the solution that return groups which have to stay.
        """
        while True:
            self.rounds += 1
            self._fixed_point()
            for reason, check in restore.items():
                groups = check(self)
                if len(groups):
                    self.may[groups] = False
                    self.restored.update(dict.fromkeys(groups.tolist(), reason))
                    break
            else:
                return

    def follow(self, given: Iterable[tuple[Tensor, Bools]]) -> bool:
        """Let leave just these labels, and the rows that leave with them; whether that can be.

        Args:
            given: arrays of labels, and whether each leaves (broadcastable).
        """
        leave, stay = np.zeros_like(self.may), np.zeros_like(self.may)
        for labels, gone in given:
            groups, gone = np.broadcast_arrays(self.groups_of(labels), gone)
            leave[groups[gone]] = stay[groups[~gone]] = True
        self.may = np.where(self._rows, ~stay, leave & ~stay)
        self._fixed_point()
        return bool(self.removed[leave].all()) and not self.removed[stay].any()

    def _fixed_point(self) -> None:
        row, outer, inner = self.triples.T if len(self.triples) else np.zeros((3, 0), dtype=np.int64)
        while True:
            removed = self.may & ~self._rows
            for _ in range(64):  # rows of rows: as deep as axes nest
                again = removed.copy()
                again[row] = False
                np.logical_or.at(again, row, removed[outer] | removed[inner])
                if np.array_equal(again, removed):
                    break
                removed = again
            may = self.may.copy()
            np.logical_and.at(may, row, removed[outer] | removed[inner] | ~removed[row])
            np.logical_and.at(may, outer, may[row])
            np.logical_and.at(may, inner, may[row] | (removed & self.may)[outer])
            if np.array_equal(may, self.may):
                self.removed = removed
                return
            self.may = may


# -- what restores ------------------------------------------------------------------------------


def regularity(axes: Sequence[Axis]) -> Restore:
    """Equal counts of units at every kept position of the other axes."""

    def check(s: Solution) -> Ints:
        found: list[Ints] = []
        for own, axis, there in _at_kept(axes, s):
            kept = (~s.leaves(own)).sum(axis, keepdims=True)
            most = np.where(there, kept, 0).max()
            short = np.where(there, most - kept, 0)
            if short.any():
                found.append(s.groups_of(own)[s.best(own, short, axis)])
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)

    return check


def never_empty(axes: Sequence[Axis]) -> Restore:
    """No axis of the model's own tensors loses all its units at the positions of the others that are kept."""

    def check(s: Solution) -> Ints:
        found: list[Ints] = []
        for own, _, there in _at_kept(axes, s):
            if (s.leaves(own) | ~there).all():
                flat = own[torch.from_numpy(np.broadcast_to(there, own.shape).copy())]
                found.append(s.groups_of(flat)[s.best(flat, 1)])
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)

    return check


def _at_kept(axes: Sequence[Axis], s: Solution) -> Iterator[tuple[Tensor, int, Bools]]:
    """The labels of each axis, where they vary along, and at which positions of the other axes anything is kept."""
    for one in axes:
        own, axis = one.labels[one.axis], one.axis
        assert own is not None
        if not own.numel():
            continue
        over = [d for d, n in enumerate(own.shape) if n > 1 and d != axis]
        there = np.ones((1,) * own.ndim, dtype=bool)
        for d in over:
            array = one.labels[d]
            if array is not None:  # which may be ragged itself, along axes that do not matter here
                rest = tuple(i for i in range(array.ndim) if i not in over)
                there = there & (~s.leaves(array)).any(rest, keepdims=True)
        if there.any():
            yield own, axis, there


def multiples(axes: Sequence[tuple[Tensor, int]]) -> Restore:
    """Each axis keeps a multiple of its number of units."""

    def check(s: Solution) -> Ints:
        found = []
        for labels, multiple in axes:
            flat = labels.reshape(-1)
            lacking = -int((~s.leaves(flat)).sum()) % multiple
            if lacking:
                found.append(s.groups_of(flat)[s.best(flat, lacking)])
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)

    return check


def carriers(c: Coupling) -> Restore:
    """Where constants leave through a carrier, one unit with a constant stays (per group of a grouped convolution)."""
    needy = [k for k in c.contractions if k.place in ("carrier", "both")]

    def check(s: Solution) -> Ints:
        found = []
        for contraction in needy:
            leaves = s.leaves(contraction.labels)
            size = contraction.maps.square().sum(1).numpy()
            nonzero = contraction.nonzero.numpy() & (size > 0)
            for part in np.split(np.arange(len(leaves)), contraction.groups):
                if leaves[part].all() and contraction.groups > 1:
                    continue  # the whole group is gone
                gone, there = nonzero[part] & leaves[part], nonzero[part] & ~leaves[part]
                if gone.any() and not there.any():
                    best = part[np.argmax(np.where(gone, size[part], -1.0))]
                    found.append(s.groups_of(contraction.labels)[best])
        return np.unique(np.array(found, dtype=np.int64))

    return check


# -- arrays -------------------------------------------------------------------------------------


def _flat(labels: Tensor) -> Ints:
    """Distinct storage of a label array: expanded axes are read once."""
    for axis in range(labels.ndim):
        if labels.stride(axis) == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    found: Ints = labels.reshape(-1).numpy()
    return found


def _joined(arrays: Sequence[Tensor]) -> Ints:
    """The labels in several arrays."""
    return np.concatenate([_flat(labels) for labels in arrays]) if arrays else np.zeros(0, dtype=np.int64)


def _pairs(edges: Sequence[tuple[Tensor, Tensor]]) -> Ints:
    parts = []
    for a, b in edges:
        x, y = torch.broadcast_tensors(a, b)
        parts.append(np.stack([x.reshape(-1).numpy(), y.reshape(-1).numpy()], 1))
    return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)


def _triples(c: Coupling) -> Ints:
    """How an axis is taken apart (a number), and its rows, outer and inner units."""
    parts = []
    for (outer, inner), triple in zip(c.factors, c.triples, strict=True):
        units = [t.reshape(-1).numpy() for t in torch.broadcast_tensors(*triple)]
        parts.append(np.stack([np.full(len(units[0]), (outer << 31) + inner), *units], 1))
    return np.concatenate(parts) if parts else np.zeros((0, 4), dtype=np.int64)


def _components(count: int, pairs: Ints) -> Ints:
    from scipy.sparse import coo_matrix  # here, since they take long to import
    from scipy.sparse.csgraph import connected_components

    if count == 0:
        return np.zeros(0, dtype=np.int64)
    ones = np.ones(len(pairs), dtype=np.int8)
    matrix = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    found: Ints = connected_components(matrix, directed=False)[1].astype(np.int64)
    return found


def _congruence(group: Ints, triples: Ints) -> tuple[Ints, Ints]:
    """Merge groups until the same row of axes taken apart alike means the same outer and inner, and the reverse.

    Args:
        group: of each label.
        triples: labels of rows, outer and inner units, in the last three columns; what the others hold must be equal.

    Returns:
        The groups of labels, and the triples of groups.
    """
    while True:
        t = _distinct(np.concatenate([triples[:, :-3], group[triples[:, -3:]]], 1))
        if not len(t):
            return group, t[:, -3:]
        same = (t[1:, :-2] == t[:-1, :-2]).all(1)
        pairs = [np.stack([t[1:, k][same], t[:-1, k][same]], 1) for k in (-2, -1)]
        by_units = t[np.lexsort((t[:, -1], t[:, -2]))]
        same = (by_units[1:, -2:] == by_units[:-1, -2:]).all(1)
        pairs.append(np.stack([by_units[1:, -3][same], by_units[:-1, -3][same]], 1))
        joined = np.concatenate(pairs)
        joined = joined[joined[:, 0] != joined[:, 1]]
        if not len(joined):
            return group, _distinct(t[:, -3:])
        group = _components(int(group.max()) + 1, joined)[group]


def _distinct(rows: Ints) -> Ints:
    """The distinct rows in order: what ``np.unique(rows, axis=0)`` gives, several times as fast."""
    rows = rows[np.lexsort(rows.T[::-1])]
    return rows[np.append(True, (rows[1:] != rows[:-1]).any(1))] if len(rows) else rows


def count_kept(kept: list[Bools | None], axis: int) -> int:
    """Units along an axis at the positions that stay."""
    mask = kept[axis]
    assert mask is not None
    if not mask.size:
        return 0
    if mask.size == mask.shape[axis] and all(o is None or o.any() for o in kept):  # not ragged
        return int(np.count_nonzero(mask))
    others = np.ones((1,) * mask.ndim, dtype=bool)
    for i, other in enumerate(kept):
        if i != axis and other is not None:
            others = others & other
    counts = mask.sum(axis, keepdims=True)
    counts, others = np.broadcast_arrays(counts, others)
    if not counts.size:  # an empty value: another axis has no units at all
        return int(mask.sum(axis).max())
    return int(np.where(others, counts, 0).max())
