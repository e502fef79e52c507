"""Ops that join or index values: cat, stack, repeat, scatter into a slice, embedding, index, gather.

Algebra: facts and labels are joined as the values are. An axis that is looked up by index keeps all its units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels
from maskprop.infer.facts import Fact, all_over, any_over, reduce_to, spread
from maskprop.infer.op import Op
from maskprop.infer.rules.movement import Slice, cut
from maskprop.infer.rules.pointwise import broadcast_labels
from maskprop.infer.rules.registry import Rule, evaluate, register

aten = torch.ops.aten


@register(aten.cat.default, aten.stack.default)
class Cat(Rule):
    """Join along an axis (a new one, for stack)."""

    def _stacks(self, op: Op) -> bool:
        return op.target is aten.stack.default

    def _dim(self, op: Op) -> int:
        return int(op.arg("dim", 0)) % len(op.shape)

    def _inputs(self, op: Op, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.unsqueeze(self._dim(op)) for t in tensors] if self._stacks(op) else list(tensors)

    def _sizes(self, op: Op) -> list[int]:
        return (
            [1] * len(op.shapes)
            if self._stacks(op)
            else [s[self._dim(op)] if len(s) == len(op.shape) else 0 for s in op.shapes]
        )

    def _join(self, op: Op, tensors: Sequence[Tensor]) -> Tensor:
        dim, sizes = self._dim(op), self._sizes(op)
        parts = []
        common = torch.broadcast_shapes(
            *(
                [1 if i == dim else n for i, n in enumerate(t.shape)]
                for t, n in zip(tensors, sizes, strict=True)
                if n
            )
        )
        for t, n in zip(tensors, sizes, strict=True):
            if n:  # legacy empty tensors join anything
                parts.append(t.expand([n if i == dim else m for i, m in enumerate(common)]))
        return torch.cat(parts, dim)

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        ndim = len(op.shape)
        if all(f.plain for f in facts):
            result = evaluate(op, facts)
            assert isinstance(result, Fact)
            return result
        if all(f.nothing for f in facts):
            return Fact.unknown(ndim)
        known = self._join(op, self._inputs(op, [f.known for f in facts]))
        zero = self._join(op, self._inputs(op, [f.zero for f in facts]))
        return Fact(known, zero, lambda: self._join(op, self._inputs(op, [f.value() for f in facts])))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        (n,), dim, start = needed, self._dim(op), 0
        found = []
        for size, shape in zip(self._sizes(op), op.shapes, strict=True):
            part = n if n.shape[dim] == 1 else n.narrow(dim, start, size)
            start += size
            if part.shape[dim] == 0:
                part = torch.zeros((1,) * len(shape), dtype=torch.bool)
            found.append(part.any(dim) if self._stacks(op) else part)
        return found

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        dim, sizes, ndim = self._dim(op), self._sizes(op), len(op.shape)
        arrays = [
            [None if a is None else a.unsqueeze(dim) for a in [*ls[:dim], None, *ls[dim:]]]
            if self._stacks(op)
            else list(ls)
            for ls, n in zip(labels, sizes, strict=True)
            if n
        ]
        sizes = [n for n in sizes if n]
        if self._stacks(op):  # the new axis is cut out above: put the others' labels right
            arrays = [_stacked(ls, dim) for ls in labels]
        out: Labels = []
        for axis in range(ndim):
            met = [ls[axis] for ls in arrays]
            if axis == dim:
                out.append(self._along(met, sizes, dim, ndim, c))
                continue
            met = [None if a is None else c.uniform(a, [dim]) for a in met]
            result = met[0]
            for other in met[1:]:
                result = c.equal(result, other) if result is not None or other is not None else None
            out.append(result)
        return out

    def _along(
        self, met: Sequence[Tensor | None], sizes: Sequence[int], dim: int, ndim: int, c: Coupling
    ) -> Tensor | None:
        if all(a is None for a in met):
            return None
        parts = []
        for a, n in zip(met, sizes, strict=True):
            if a is None:
                a = c.fresh([n if i == dim else 1 for i in range(ndim)])
                c.pin(a, "is joined from an axis that cannot shrink")
            parts.append(a)
        common = torch.broadcast_shapes(
            *([1 if i == dim else n for i, n in enumerate(t.shape)] for t in parts)
        )
        return torch.cat(
            [t.expand([t.shape[dim] if i == dim else n for i, n in enumerate(common)]) for t in parts], dim
        )


def _stacked(labels: Labels, dim: int) -> Labels:
    moved: Labels = [None if a is None else a.unsqueeze(dim) for a in labels]
    return [*moved[:dim], None, *moved[dim:]]


@register(aten.repeat.default)
class Repeat(Rule):
    """Tile: ``repeat`` copies of each axis."""

    def _tile(self, op: Op, t: Tensor) -> Tensor:
        repeats = op.arg("repeats")
        t = t.reshape((1,) * (len(repeats) - t.ndim) + t.shape)
        return t.repeat([r if n > 1 else 1 for r, n in zip(repeats, t.shape, strict=True)])

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        fact = facts[0]
        if fact.nothing:
            return Fact.unknown(len(op.shape))
        return Fact(
            self._tile(op, fact.known),
            self._tile(op, fact.zero),
            lambda: self._tile(op, fact.value()),
            fact.plain,
        )

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        n, repeats, shape = needed[0], op.arg("repeats"), op.shapes[0]
        for axis in reversed(range(len(repeats))):
            own = axis - len(repeats) + len(shape)
            size = shape[own] if own >= 0 else 1
            if n.shape[axis] != 1:
                n = n.unflatten(axis, (repeats[axis], size)).any(axis)
        return [reduce_to(n, shape)]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        repeats = op.arg("repeats")
        lead = len(repeats) - len(op.shapes[0])
        return [None] * lead + [None if a is None else self._tile(op, a) for a in labels[0]]


@register(aten.slice_scatter.default, aten.select_scatter.default)
class ScatterInto(Rule):
    """The base with a slice replaced by the source."""

    def _slice(self, op: Op) -> Slice:
        shape = op.shapes[0]
        dim = int(op.arg("dim", 0)) % len(shape)
        if op.target is aten.select_scatter.default:
            index = op.arg("index") % shape[dim]
            return Slice(shape, dim, index, index + 1)
        start, stop, step = slice(op.arg("start"), op.arg("end"), op.arg("step", 1)).indices(shape[dim])
        return Slice(shape, dim, start, max(start, stop), step)

    def _source(self, op: Op, t: Tensor, dim: int) -> Tensor:
        return t.unsqueeze(dim) if op.target is aten.select_scatter.default else t

    def _join(self, op: Op, base: Tensor, source: Tensor) -> Tensor:
        part = self._slice(op)
        source = self._source(op, source, part.dim)
        if part.dst == part.src:
            return source
        if (
            base.shape[part.dim] == 1
            and source.shape[part.dim] == 1
            and base.shape == source.shape
            and torch.equal(base, source)
        ):
            return base
        shape = list(
            torch.broadcast_shapes(
                *([1 if i == part.dim else n for i, n in enumerate(t.shape)] for t in (base, source))
            )
        )
        shape[part.dim] = part.src[part.dim]
        out = base.expand(shape).clone()
        if source.dtype != out.dtype:
            out = out.to(torch.promote_types(source.dtype, out.dtype))
        out[part._index] = source.to(out.dtype)
        return out

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        base, source = facts
        if all(f.plain for f in facts):
            result = evaluate(op, facts)
            assert isinstance(result, Fact)
            return result
        return Fact(
            self._join(op, base.known, source.known),
            self._join(op, base.zero, source.zero),
            lambda: self._join(op, base.value(), source.value()),
        )

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        part = self._slice(op)
        n = needed[0]
        base = n
        if part.dst == part.src:
            base = n & False
        else:
            base = spread(n, [part.dim], part.src).clone()
            base[part._index] = False
        source = part.move(n)
        if op.target is aten.select_scatter.default:
            source = source.squeeze(part.dim)
        return [base, source]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        part = self._slice(op)
        select = op.target is aten.select_scatter.default
        base = list(labels[0])
        source = _stacked(labels[1], part.dim) if select else list(labels[1])
        if part.dst != part.src:
            cut(
                base,
                part.dim,
                part.src[part.dim],
                part.start,
                part.stop,
                part.step,
                c,
                "one index is written along this axis" if select else "",
            )
        out: Labels = []
        for axis, (b, s) in enumerate(zip(base, source, strict=True)):
            if axis == part.dim:
                if not select and (b is not None or s is not None):
                    c.equal(None if b is None else part.move(b), s)
                out.append(b)
            else:
                out.append(c.equal(b, s) if b is not None or s is not None else None)
        return out


@register(aten.embedding.default)
class Embedding(Rule):
    """Rows of a table by index: the table's rows stay, its columns are the result's last axis."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        table, index = facts
        if table.total and index.total:
            result = evaluate(op, facts)
            assert isinstance(result, Fact)
            return result
        ndim = len(op.shape)
        zero = all_over(table.zero, [0]).reshape((1,) * (ndim - 1) + (-1,))
        if not bool(zero.any()):
            return Fact.unknown(ndim)
        return Fact(zero, zero, torch.zeros((1,) * ndim, dtype=torch.float64))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        n = needed[0]
        columns = any_over(n, range(n.ndim - 1)).reshape(1, -1)
        return [columns, torch.full((1,) * len(op.shapes[1]), bool(columns.any()))]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        table, index = labels
        c.pin(table[0], "is looked up by index")
        columns = c.uniform(table[1], [0])
        lead = [None if a is None else a.unsqueeze(-1) for a in index]
        return [*lead, None if columns is None else columns.reshape((1,) * (len(op.shape) - 1) + (-1,))]


class _Lookup(Rule):
    """Shared by index ops: ``looked`` axes keep their units, the others pass in order."""

    def _plan(self, op: Op) -> tuple[list[int], int] | None:
        """Looked-up axes of the source and where their index axes stand in the result; ``None`` if not contiguous."""
        raise NotImplementedError

    def _lengths(self, op: Op) -> int:
        """How many axes the looked-up ones become."""
        raise NotImplementedError

    def _axes(self, op: Op) -> list[int | None] | None:
        """For each result axis, the source axis that it is, or ``None`` for an index axis."""
        plan = self._plan(op)
        if plan is None:
            return None
        looked, at = plan
        kept: list[int | None] = [i for i in range(len(op.shapes[0])) if i not in looked]
        return kept[:at] + [None] * self._lengths(op) + kept[at:]

    def _pass(self, t: Tensor, axes: Sequence[int | None]) -> Tensor:
        kept = [a for a in axes if a is not None]
        gone = [i for i in range(t.ndim) if i not in kept]
        t = t.permute([*kept, *gone]).reshape([t.shape[a] for a in kept])
        return t.reshape([1 if a is None else t.shape[kept.index(a)] for a in axes])

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        axes, fact = self._axes(op), facts[0]
        if all(f.total for f in facts):
            result = evaluate(op, facts)
            assert isinstance(result, Fact)
            return result
        if axes is None or fact.nothing:
            return Fact.unknown(len(op.shape))
        looked = [i for i in range(len(op.shapes[0])) if i not in axes]
        zero = self._pass(all_over(fact.zero, looked), axes)
        if all(fact.known.shape[i] == 1 and fact.value().shape[i] == 1 for i in looked) and not fact.plain:
            return Fact(self._pass(fact.known, axes), zero, lambda: self._pass(fact.value(), axes))
        return Fact(zero, zero, torch.zeros((1,) * len(op.shape), dtype=torch.float64))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        axes, n = self._axes(op), needed[0]
        some = bool(n.any())
        rest = [torch.full((1,) * len(s), some) for s in op.shapes[1:]]
        if axes is None:
            return [torch.full((1,) * len(op.shapes[0]), some), *rest]
        n = any_over(n, [i for i, a in enumerate(axes) if a is None])
        kept = [i for i, a in enumerate(axes) if a is not None]
        shape = [1] * len(op.shapes[0])
        for i in kept:
            shape[axes[i]] = n.shape[i]  # type: ignore[index]
        return [n.reshape(shape), *rest]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        axes, source = self._axes(op), labels[0]
        for array in labels[1:]:
            c.pin_all(array, "is used as an index")
        if axes is None:
            c.pin_all(source, "is indexed in a mixed order")
            return [None] * len(op.shape)
        looked = [i for i in range(len(source)) if i not in axes]
        for i in looked:
            c.pin(source[i], "is looked up by index")
        out: Labels = []
        for axis in axes:
            array = None if axis is None else source[axis]
            out.append(
                None
                if array is None
                else self._pass(c.uniform(array, [i for i in looked if i != axis]), axes)
            )  # type: ignore[arg-type]
        return out


@register(aten.index.Tensor, aten._unsafe_index.Tensor)
class Index(_Lookup):
    """``x[i, :, j]`` with index tensors."""

    def _indices(self, op: Op) -> list[torch.fx.Node | None]:
        return list(op.arg("indices"))

    def _plan(self, op: Op) -> tuple[list[int], int] | None:
        indices = self._indices(op)
        if any(i is not None and i.meta["tensor"].dtype in (torch.bool, torch.uint8) for i in indices):
            return None
        looked = [i for i, index in enumerate(indices) if index is not None]
        contiguous = looked == list(range(looked[0], looked[-1] + 1))
        return looked, looked[0] if contiguous else 0

    def _lengths(self, op: Op) -> int:
        return max(len(i.meta["tensor"].shape) for i in self._indices(op) if i is not None)


@register(aten.index_select.default)
class IndexSelect(_Lookup):
    """``x`` at ``index`` along one axis."""

    def _plan(self, op: Op) -> tuple[list[int], int] | None:
        dim = op.arg("dim") % len(op.shapes[0])
        return [dim], dim

    def _lengths(self, op: Op) -> int:
        return 1


@register(aten.gather.default)
class Gather(Rule):
    """``x`` at ``index`` along one axis, elementwise along the others."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        if all(f.total for f in facts):
            result = evaluate(op, facts)
            assert isinstance(result, Fact)
            return result
        zero = all_over(facts[0].zero, [op.arg("dim") % max(1, len(op.shape))])
        same = all(
            a == b or i == op.arg("dim") % len(op.shape)
            for i, (a, b) in enumerate(zip(op.shapes[0], op.shapes[1], strict=True))
        )
        if not same or not bool(zero.any()):
            return Fact.unknown(len(op.shape))
        return Fact(zero, zero, torch.zeros((1,) * len(op.shape), dtype=torch.float64))

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        dim = op.arg("dim") % len(op.shape)
        source, index = list(labels[0]), list(labels[1])
        c.pin(source[dim], "is looked up by index")
        for i, (a, b) in enumerate(zip(op.shapes[0], op.shapes[1], strict=True)):
            if i != dim and a != b:
                c.pin(source[i], "is looked up in part")
                source[i] = index[i]
        source = [None if a is None or i == dim else c.uniform(a, [dim]) for i, a in enumerate(source)]
        source[dim] = index[dim]  # the result has the index's units along the axis it looks up
        return broadcast_labels(op.shape, [op.shape, op.shape], [source, index], c)
