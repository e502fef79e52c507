"""Ops that join values: cat, stack, repeat, scatter into a slice.

Algebra: facts and labels are joined as the values are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels, moved
from maskprop.infer.facts import Fact, broadcast_shape, everywhere, lead, reduce_to, spread
from maskprop.infer.op import Op
from maskprop.infer.rules.registry import Rule, evaluate, register
from maskprop.infer.rules.steps import Expand, Slice

aten = torch.ops.aten


@register(aten.cat.default, aten.stack.default)
class Cat(Rule):
    """Join along an axis: an old one for cat, a new one of size 1 for stack.

    What holds nothing yet (a cache, windows of an input that fills none) may hold something in another call: what is
    zero of the result is zero there too, and what is needed of the result is needed there. Not so where that differs
    along the axis: then it is about the units of the others.
    """

    def _dim(self, op: Op) -> int:
        return int(op.arg("dim", 0)) % len(op.shape)

    def _lift(self, op: Op, t: Tensor) -> Tensor:
        return t.unsqueeze(self._dim(op)) if op.target is aten.stack.default else t

    def _sizes(self, op: Op) -> list[int]:
        """Of the inputs along the axis; 0 for the empty ones, of which cat ignores those of another rank."""
        if op.target is aten.stack.default:
            return [1] * len(op.shapes)
        return [s[self._dim(op)] if len(s) == len(op.shape) else 0 for s in op.shapes]

    def _join(self, op: Op, tensors: Sequence[Tensor]) -> Tensor:
        joined = [(self._lift(op, t), n) for t, n in zip(tensors, self._sizes(op), strict=True) if n]
        return _concatenate([t for t, _ in joined], [n for _, n in joined], self._dim(op))

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        if all(f.plain for f in facts):
            return evaluate(op, facts)
        if all(f.nothing for f in facts):
            return Fact.unknown(len(op.shape))
        known, zero = (self._join(op, list(parts)) for parts in zip(*((f.known, f.zero) for f in facts), strict=True))
        dim, empty = self._dim(op), [n == 0 for n in self._sizes(op)]
        if any(empty) and not any(f.known.shape[dim] > 1 for f, e in zip(facts, empty, strict=True) if not e):
            for f in (f for f, e in zip(facts, empty, strict=True) if e and f.zero.ndim == len(op.shape)):
                known = zero = zero & f.zero.all(dim, keepdim=True)
        return Fact(known, zero, lambda: self._join(op, [f.value() for f in facts]))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        (n,), dim, start = needed, self._dim(op), 0
        found = []
        for size, shape in zip(self._sizes(op), op.shapes, strict=True):
            part = n if n.shape[dim] == 1 else n.narrow(dim, start, size)
            start += size
            if size == 0:
                part = n if len(shape) == n.ndim and n.shape[dim] == 1 else everywhere(False, len(shape))
            found.append(part.squeeze(dim) if op.target is aten.stack.default else part)
        return found

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        dim, ndim = self._dim(op), len(op.shape)
        inputs = [[moved(a, lambda t: self._lift(op, t)) for a in ls] for ls in labels]
        if op.target is aten.stack.default:
            inputs = [[*ls[:dim], None, *ls[dim:]] for ls in inputs]
        joined = [(ls, n) for ls, n in zip(inputs, self._sizes(op), strict=True) if n]
        out: Labels = []
        for axis in range(ndim):
            if axis == dim:
                out.append(self._along([ls[dim] for ls, _ in joined], [n for _, n in joined], dim, ndim, c))
                continue
            result, *others = (c.uniform(ls[axis], [dim]) for ls in inputs if len(ls) == ndim)
            for other in others:
                result = c.equal(result, other)
            out.append(result)
        return out

    def _along(
        self, met: Sequence[Tensor | None], sizes: Sequence[int], dim: int, ndim: int, c: Coupling
    ) -> Tensor | None:
        """Labels of the joined axis."""
        if all(a is None for a in met):
            return None
        parts = []
        for a, n in zip(met, sizes, strict=True):
            if a is None:
                a = c.fresh([n if i == dim else 1 for i in range(ndim)])
                c.pin(a, "is joined from an axis that cannot shrink")
            parts.append(a)
        return _concatenate(parts, sizes, dim)


def _concatenate(tensors: Sequence[Tensor], sizes: Sequence[int], dim: int) -> Tensor:
    """Join broadcastable tensors, of these sizes along the axis."""
    shapes = [[1 if i == dim else n for i, n in enumerate(t.shape)] for t in tensors]
    common = broadcast_shape(*shapes)
    return torch.cat(
        [t.expand([*common[:dim], n, *common[dim + 1 :]]) for t, n in zip(tensors, sizes, strict=True)], dim
    )


@register(aten.repeat.default)
class Repeat(Rule):
    """Tile: ``repeat`` copies of each axis."""

    def _tile(self, t: Tensor, repeats: Sequence[int]) -> Tensor:
        t = lead(t, len(repeats))
        return t.repeat([r if n > 1 else 1 for r, n in zip(repeats, t.shape, strict=True)])

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        return facts[0].map(lambda t: self._tile(t, op.arg("repeats")))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        n, repeats, shape = needed[0], op.arg("repeats"), op.shapes[0]
        for axis in reversed(range(len(repeats))):
            own = axis - len(repeats) + len(shape)
            size = shape[own] if own >= 0 else 1
            if n.shape[axis] != 1:
                n = n.unflatten(axis, (repeats[axis], size)).any(axis)
        return [reduce_to(n, shape)]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        # copies of a single unit are what ``expand`` makes: each as free as what it meets
        repeats, shape = op.arg("repeats"), op.shapes[0]
        lone = (1,) * (len(repeats) - len(shape)) + shape
        expand = Expand(shape, tuple(r if n == 1 else n for r, n in zip(repeats, lone, strict=True)))
        copies = [1 if n == 1 else r for r, n in zip(repeats, lone, strict=True)]
        return [moved(a, lambda t: self._tile(t, copies)) for a in expand.couple(labels[0], c)]


@register(aten.slice_scatter.default, aten.select_scatter.default)
class ScatterInto(Rule):
    """The base with a slice replaced by the source."""

    def _slice(self, op: Op) -> Slice:
        shape = op.shapes[0]
        dim = int(op.arg("dim", 0)) % len(shape)
        if op.target is aten.select_scatter.default:
            index = op.arg("index") % shape[dim]
            return Slice(shape, dim, index, index + 1, pins="one index is written along this axis")
        start, stop, step = slice(op.arg("start"), op.arg("end"), op.arg("step", 1)).indices(shape[dim])
        return Slice(shape, dim, start, max(start, stop), step)

    def _lift(self, op: Op, source: Tensor) -> Tensor:
        return source.unsqueeze(self._slice(op).dim) if op.target is aten.select_scatter.default else source

    def _join(self, op: Op, base: Tensor, source: Tensor) -> Tensor:
        part, source = self._slice(op), self._lift(op, source)
        if part.dst == part.src:
            return source
        sizes = [
            broadcast_shape((a,), (b,))[0] if i != part.dim else 1
            for i, (a, b) in enumerate(zip(base.shape, source.shape, strict=True))
        ]
        sizes[part.dim] = part.src[part.dim]
        out = base.expand(sizes).to(torch.promote_types(base.dtype, source.dtype), copy=True)
        out[part.index] = source.to(out.dtype)
        return out

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        base, source = facts
        if all(f.plain for f in facts):
            return evaluate(op, facts)
        if all(f.nothing for f in facts):
            return Fact.unknown(len(op.shape))
        return Fact(
            self._join(op, base.known, source.known),
            self._join(op, base.zero, source.zero),
            lambda: self._join(op, base.value(), source.value()),
        )

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        part, (n,) = self._slice(op), needed
        base = spread(n, [part.dim], part.src).clone()
        base[part.index] = False
        source = part.move(n)
        return [base, source.squeeze(part.dim) if op.target is aten.select_scatter.default else source]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        part, base = self._slice(op), list(labels[0])
        source = [moved(a, lambda t: self._lift(op, t)) for a in labels[1]]
        inside = part.couple(base, c)
        if op.target is aten.select_scatter.default:
            source = [*source[: part.dim], inside[part.dim], *source[part.dim :]]
        out: Labels = []
        for axis, (b, s) in enumerate(zip(base, source, strict=True)):
            if axis == part.dim:
                c.equal(inside[axis], s)
                out.append(b)
            else:
                out.append(c.equal(c.uniform(b, [part.dim]), c.uniform(s, [part.dim])))
        return out
