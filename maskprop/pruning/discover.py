"""Find the groups: from labels that leave together to rows of interchangeable units.

Two units are interchangeable if they take equally many elements from the same axes of the same parameters.
Where a *regular* axis cuts them (head dims, channels of a grouped convolution, thirds of a fused qkv), each
part of it must lose equally many: such units are joined into one group of several slots.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, csr_matrix
from torch import nn

from maskprop.align.solve import Ints
from maskprop.graph.graph import is_op
from maskprop.graph.trace import Tracer, split_inputs
from maskprop.infer.op import Op
from maskprop.pruning.groups import Group, Groups, Member
from maskprop.pruning.masking import refuse_masks
from maskprop.pruning.structure import Structure, consumed_axes

Prints = NDArray[np.uint64]


def prunable_groups(model: nn.Module, dummy_input: Any, *, tracer: str | Tracer = "auto") -> Groups:
    """The groups of units that can leave a model, as the alignment stage finds them.

    Args:
        model: left as it is.
        dummy_input: see :class:`maskprop.ModelSpeedup`.
        tracer: ``"auto"``, ``"fake"``, ``"concrete"``, ``"meta"`` or a function.

    Returns:
        The groups, without those of a single unit.

    Raises:
        DummyInputError: ``forward`` fails on the input.
        TraceError: the model cannot be traced.
        MaskingError: there are masks on it.
    """
    refuse_masks(model)
    inputs = split_inputs(dummy_input)
    structure = Structure(model, inputs, tracer)
    return Groups(model, _Discovery(structure).groups(), structure, inputs)


@dataclass
class _Slot:
    """Interchangeable units in one part of the regular axes."""

    units: list[int]
    regulars: frozenset[int]
    signature: int


class _Discovery:
    """Attributes: units are numbered by their place in ``structure.units``."""

    def __init__(self, structure: Structure) -> None:
        self.s = structure
        self.classes = len(structure.base.may)
        self.reach = self._reach()
        owned = [structure.base.groups_of(labels).reshape(-1) for *_, labels in structure.owned]
        self.counts: csc_matrix = _sorted(csc_matrix(self._incidence(owned) @ self.reach))
        self.consumed = consumed_axes(structure.graph)
        self.parameters = {name for name, _ in structure.model.named_parameters(remove_duplicate=False)}
        made = [n in self.parameters and (n, axis) not in self.consumed for n, axis, _ in structure.owned]
        has_producer = np.asarray(self.counts[np.flatnonzero(made)].sum(0)).reshape(-1) > 0
        self.kinds = _Kinds(structure, set(structure.units[has_producer].tolist()))

    def groups(self) -> list[Group]:
        slots = self._slots()
        found = [pair for joined in self._join(slots) if (pair := self._group(joined)) is not None]
        found.sort(key=lambda pair: pair[0])
        names: dict[str, int] = defaultdict(int)
        groups = []
        for _, group in found:
            names[group.name] += 1
            if names[group.name] > 1:
                group.name += f"#{names[group.name]}"
            groups.append(group)
        return groups

    # -- units ----------------------------------------------------------------------------------

    def _reach(self) -> csc_matrix:
        """(classes, units): which labels' groups leave with a unit, rows of rows included."""
        count, units, triples = self.classes, self.s.units, self.s.base.triples
        ones = np.ones(len(units), dtype=np.int32)
        total = csr_matrix((ones, (units, np.arange(len(units)))), shape=(count, len(units)))
        if len(triples):
            rows = np.concatenate([triples[:, 0], triples[:, 0]])
            parents = np.concatenate([triples[:, 1], triples[:, 2]])
            up = csr_matrix((np.ones(len(rows), dtype=np.int32), (rows, parents)), shape=(count, count))
            found = -1
            while total.nnz > found:  # rows of rows may lead in circles
                found = total.nnz
                total = csr_matrix(total + up @ total)
                total.data[:] = 1
        return csc_matrix(total)

    def _incidence(self, arrays: list[Ints]) -> csr_matrix:
        """(arrays, classes): how many elements of each array are in a class."""
        index = (
            np.concatenate([np.full(len(a), i) for i, a in enumerate(arrays)])
            if arrays
            else np.zeros(0, dtype=np.int64)
        )
        values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
        ones = np.ones(len(values), dtype=np.int32)
        return csr_matrix((ones, (index, values)), shape=(len(arrays), self.classes))

    def _slots(self) -> list[_Slot]:
        """Units with the same signature, cut alike by the same regular axes."""
        units = np.flatnonzero(np.diff(self.counts.indptr))
        signature = _fingerprints(self.counts)
        place = signature.copy()
        cut_by: dict[int, list[int]] = defaultdict(list)
        for number, regular in enumerate(self.s.coupling.regulars):
            own = regular.labels[regular.axis]
            assert own is not None
            blocks = np.moveaxis(self.s.base.groups_of(own), regular.axis, -1).reshape(-1, own.shape[regular.axis])
            if len(blocks) == 1:
                continue
            counts = csc_matrix(self._incidence(list(blocks)) @ self.reach)
            has = np.diff(counts.indptr)
            met = np.flatnonzero(has)
            starts = counts.indptr[met]
            even = np.zeros(len(has), dtype=bool)
            if len(met):
                even[met] = np.minimum.reduceat(counts.data, starts) == np.maximum.reduceat(counts.data, starts)
            cut = np.flatnonzero((has > 0) & ~(even & (has == len(blocks))))
            with np.errstate(over="ignore"):
                place[cut] += _mix(_fingerprints(counts)[cut] + np.uint64(number))
            for unit in cut.tolist():
                cut_by[unit].append(number)
        _, first, which = np.unique(place[units], return_index=True, return_inverse=True)
        slots = [_Slot([], frozenset(cut_by.get(units[i], ())), int(signature[units[i]])) for i in first.tolist()]
        for unit, slot in zip(units.tolist(), which.tolist(), strict=True):
            slots[slot].units.append(unit)
        return sorted(slots, key=lambda slot: slot.units[0])

    def _join(self, slots: list[_Slot]) -> list[list[_Slot]]:
        """Slots that share a regular axis, if one unit of each makes it regular; else by signature."""
        parent = list(range(len(slots)))

        def root(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        first: dict[int, int] = {}
        for i, slot in enumerate(slots):
            for regular in slot.regulars:
                parent[root(i)] = root(first.setdefault(regular, i))
        families: dict[int, list[_Slot]] = defaultdict(list)
        for i, slot in enumerate(slots):
            families[root(i)].append(slot)
        found = []
        for family in families.values():
            if len({len(slot.units) for slot in family}) == 1 and self._is_regular(family):
                found.append(family)
                continue
            signatures: dict[int, list[int]] = defaultdict(list)
            for slot in family:
                signatures[slot.signature] += slot.units
            found += [[_Slot(sorted(units), frozenset(), key)] for key, units in signatures.items()]
        return found

    def _is_regular(self, family: list[_Slot]) -> bool:
        """Whether the first units of all slots together leave every regular axis regular."""
        if len(family) == 1:
            return not family[0].regulars
        units = self.s.units[[slot.units[0] for slot in family]]
        return len(family[0].units) > 1 and bool(self.s.remove(units).removed[units].all())

    # -- groups ---------------------------------------------------------------------------------

    def _group(self, slots: list[_Slot]) -> tuple[tuple[int, int], Group] | None:
        units = np.array([u for slot in slots for u in slot.units])
        if len(slots[0].units) < 2:
            return None
        arrays = np.unique(np.concatenate([_column(self.counts, slot.units[0])[0] for slot in slots]))
        place = self._places(units, arrays[0])
        order = np.argsort(place, kind="stable")
        units = units[order]
        rank = np.argsort(order)
        numbers = torch.from_numpy(np.sort(rank.reshape(len(slots), -1), 1))
        numbers = numbers[numbers[:, 0].argsort()]
        members = self._members(units, arrays)
        if all(m.consumes for m in members):  # units of buffers, or that only a repetition makes
            return None
        kind = self.kinds.of(self.s.units[units[0]])
        producer = next((m for m in members if not m.consumes and m.units.ndim > 1), members[0])
        name = producer.path or producer.name
        group = Group(
            name if kind == "channel" else f"{name}:{kind}",
            kind,
            members,
            numbers,
            self.s.model,
            self.kinds.is_default(kind, self.s.units[units[0]]),
            self.s,
            self.s.units[units],
        )
        return (int(arrays[0]), int(place.min())), group

    def _places(self, units: Ints, array: int) -> Ints:
        """Position of each unit in its first parameter (or behind all, in the order of the classes)."""
        classes = self.s.base.groups_of(self.s.owned[array][2]).reshape(-1)
        where = np.full(self.classes, len(classes) + self.classes, dtype=np.int64)
        where[classes[::-1]] = np.arange(len(classes))[::-1]
        reached = self.reach[:, units]
        return np.minimum.reduceat(where[reached.indices], reached.indptr[:-1])

    def _members(self, units: Ints, arrays: Ints) -> tuple[Member, ...]:
        number = np.full(self.classes, -1, dtype=np.int64)
        reached = self.reach[:, units]
        number[reached.indices] = np.repeat(np.arange(len(units)), np.diff(reached.indptr))
        members = []
        for j in arrays:
            name, axis, labels = self.s.owned[j]
            if name not in self.parameters:
                continue
            owner = self.s.model.get_submodule(name.rpartition(".")[0])
            units_of = torch.from_numpy(number[self.s.base.groups_of(labels)])
            members.append(Member(name, axis, units_of, (name, axis) in self.consumed, type(owner)))
        return tuple(members)


class _Kinds:
    """What a unit is, by the ops that its labels meet.

    Args:
        s: the structure.
        free: units that some parameter makes and that can leave by themselves.
    """

    def __init__(self, s: Structure, free: set[int]) -> None:
        self.s, self.free = s, free
        triples = s.base.triples
        self.outer_of: dict[int, set[int]] = defaultdict(set)
        self.inner_of: dict[int, set[int]] = defaultdict(set)
        self.outers, self.inners = set(triples[:, 1].tolist()), set(triples[:, 2].tolist())
        batches: set[int] = set()
        for node in s.graph.fx.nodes:
            if is_op(node) and Op(node).target._schema.name in ("aten::bmm", "aten::baddbmm"):
                labels = s.coupling.labels[node][0]
                if labels is not None:
                    batches |= set(s.base.groups_of(labels).reshape(-1).tolist())
        rows = np.isin(triples[:, 0], list(batches)) if len(triples) else np.zeros(0, dtype=bool)
        self.query_groups = set(triples[rows, 1].tolist())
        self.heads = (batches & self.outers) | set(triples[rows, 2].tolist())
        self.experts = batches - self.outers
        inside = (
            np.isin(triples[:, 1], list(self.heads | self.query_groups | set(triples[rows, 0].tolist())))
            if len(triples)
            else rows
        )
        self.dims = set(triples[inside, 2].tolist()) - self.heads
        self.parents: dict[int, int] = dict(zip(triples[:, 2].tolist(), triples[:, 1].tolist(), strict=True))
        self.children: dict[int, int] = dict(zip(triples[:, 1].tolist(), triples[:, 2].tolist(), strict=True))

    def of(self, unit: int) -> str:
        unit = int(unit)
        if unit in self.query_groups:
            return "query group"
        if unit in self.heads:
            return "head"
        if unit in self.dims:
            return "head dim"
        if unit in self.experts:
            return "expert"
        return "channel group" if unit in self.outers else "channel"

    def is_default(self, kind: str, unit: int) -> bool:
        """Heads rather than their dims, the outermost of nested heads, channels rather than groups."""
        unit = int(unit)
        if kind == "head":
            parent = self.parents.get(unit)
            return parent not in self.query_groups or parent not in self.free
        if kind == "channel group":
            return self.children.get(unit) not in self.free
        return kind != "head dim"


def _column(matrix: csc_matrix, column: int) -> tuple[Ints, Ints]:
    """Rows and values of a column, whose indices are sorted."""
    part = slice(matrix.indptr[column], matrix.indptr[column + 1])
    return matrix.indices[part], matrix.data[part]


def _fingerprints(matrix: csc_matrix) -> Prints:
    """A 64-bit number a column, equal for equal columns: sums of hashes of row and value, zero for an empty one."""
    found = np.zeros(matrix.shape[1], dtype=np.uint64)
    filled = np.flatnonzero(np.diff(matrix.indptr))
    if len(filled):
        entries = (matrix.indices.astype(np.uint64) << np.uint64(32)) | matrix.data.astype(np.uint64)
        found[filled] = np.add.reduceat(_mix(entries), matrix.indptr[filled])
    return found


def _mix(numbers: Prints) -> Prints:
    """Spread bits (splitmix64; Steele et al., Fast Splittable Pseudorandom Number Generators, 2014)."""
    with np.errstate(over="ignore"):
        x: Prints = numbers + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x


def _sorted(matrix: csc_matrix) -> csc_matrix:
    matrix.sort_indices()
    return matrix
