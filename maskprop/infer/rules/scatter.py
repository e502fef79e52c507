"""Ops that write values at indices: scatter, index_add, index_copy, index_put.

Algebra: an axis that is written to by index keeps all its units; along the others the base and what is written meet
unit by unit. Where the base is zero and all that is written is zero, so is the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels
from maskprop.infer.facts import Fact, all_over, any_over
from maskprop.infer.op import Op
from maskprop.infer.rules.lookup import looked_up
from maskprop.infer.rules.registry import Rule, evaluate, register

aten = torch.ops.aten


Axes = list["int | None"]


class _Writes(Rule):
    """Shared: where in the base each axis of the other inputs lies."""

    def _axes(self, op: Op) -> dict[int, Axes] | None:
        """By input, for each of its axes the base's axis that it runs along; ``None`` for an axis of an index.

        Inputs that are left out are indices. ``None`` if the call is not understood.
        """
        raise NotImplementedError

    def _looked(self, op: Op, axes: dict[int, Axes]) -> list[int]:
        """Axes of the base that are written to by index."""
        return [d for d in range(len(op.shape)) if any(d not in along for along in axes.values())]

    def _source(self, op: Op) -> int | None:
        """The position of the written values among the inputs; ``None`` if they are a number."""
        return next((p for p in map(op.position, ("src", "source", "values", "value")) if p is not None), None)

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        if all(f.total for f in facts):
            return evaluate(op, facts)
        axes, source = self._axes(op), self._source(op)
        if axes is None or (source is None and op.arg("value") != 0):
            return Fact.unknown(len(op.shape))
        zero = all_over(facts[0].zero, self._looked(op, axes))
        if source is not None:
            written = facts[source].zero
            written = all_over(
                written, [i for i, a in enumerate(axes[source]) if a is None or a in self._looked(op, axes)]
            )
            zero = zero & _lift(written, axes[source], len(op.shape))
        return Fact.zeros(zero)

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        found, axes, source = super().needed(op, facts, needed), self._axes(op), self._source(op)
        if axes is not None:
            found[0] = any_over(needed[0], self._looked(op, axes))
            if source is not None:
                found[source] = _lower(found[0], axes[source], op.shapes[source])
        return found

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        axes, out = self._axes(op), list(labels[0])
        if axes is None:
            for given in labels:
                c.pin_all(given, "is written at a mixed index")
            return [None] * len(out)
        looked = self._looked(op, axes)
        for d in looked:
            c.pin(out[d], "is written to by index")
            out[d] = None
        out = [c.uniform(a, looked) for a in out]
        for i, given in enumerate(labels[1:], 1):
            along = axes.get(i, [None] * len(given))
            index = [k for k, a in enumerate(along) if a is None or a in looked]
            for k, axis in enumerate(along):
                if axis is None or axis in looked:
                    c.pin(given[k], "is used as an index")
                elif op.shapes[i][k] == op.shape[axis]:
                    met = c.uniform(given[k], index)
                    out[axis] = c.equal(out[axis], None if met is None else _lift(met, along, len(out)))
        return out


def _lift(t: Tensor, along: Axes, ndim: int) -> Tensor:
    """What does not vary along index axes, in the base's axes."""
    sizes = [1] * ndim
    for i, axis in enumerate(along):
        if axis is not None:
            sizes[axis] = t.shape[i]
    return t.reshape(sizes)


def _lower(t: Tensor, along: Axes, shape: Sequence[int]) -> Tensor:
    """Of the base, for written values of that shape, where any of what a broadcast one becomes counts."""
    lost = [d for d in range(t.ndim) if d not in along or shape[along.index(d)] == 1]
    t = any_over(t, lost)
    return t.reshape([1 if a is None else t.shape[a] for a in along])


@register(
    aten.scatter.src, aten.scatter.value, aten.scatter.reduce, aten.scatter.value_reduce, aten.scatter_add.default,
    aten.scatter_reduce.two,
)  # fmt: skip
class Scatter(_Writes):
    """Each written value at its own index along one axis; along the others element by element."""

    def _axes(self, op: Op) -> dict[int, Axes] | None:
        base, ndim = op.shapes[0], len(op.shape)
        dim = op.arg("dim") % max(1, ndim)
        whole = [all(s[d] == base[d] for s in op.shapes[1:]) and d != dim for d in range(ndim)]
        along: Axes = [d if whole[d] else None for d in range(ndim)]
        return dict.fromkeys(range(1, len(op.shapes)), along)


@register(aten.index_add.default, aten.index_copy.default)
class IndexWrite(_Writes):
    """Slices of the written values at indices along one axis."""

    def _axes(self, op: Op) -> dict[int, Axes] | None:
        ndim = len(op.shape)
        dim = op.arg("dim") % max(1, ndim)
        source = self._source(op)
        if source is None or not ndim:
            return None
        return {source: [None if d == dim else d for d in range(ndim)]}


@register(aten.index_fill.int_Scalar)
class IndexFill(_Writes):
    """One number in the slices at indices along one axis."""

    def _axes(self, op: Op) -> dict[int, Axes] | None:
        return {1: [None]} if op.shape else None

    def _looked(self, op: Op, axes: dict[int, Axes]) -> list[int]:
        return [op.arg("dim") % len(op.shape)]


@register(aten.index_put.default, aten._unsafe_index_put.default)
class IndexPut(_Writes):
    """``x[i, :, j] = y`` or ``+= y``, the written values broadcast."""

    def _masked(self, op: Op) -> bool:
        """``x[mask] = number``: a mask from the first axis on, element by element."""
        indices, source = op.arg("indices"), self._source(op)
        kind = indices[0].meta["tensor"].dtype if len(indices) == 1 and indices[0] is not None else None
        return kind in (torch.bool, torch.uint8) and source is not None and torch.Size(op.shapes[source]).numel() == 1

    def _looked(self, op: Op, axes: dict[int, Axes]) -> list[int]:
        return [] if self._masked(op) else super()._looked(op, axes)

    def _axes(self, op: Op) -> dict[int, Axes] | None:
        source = self._source(op)
        indices = op.arg("indices")
        if self._masked(op):
            return {1: list(range(len(op.shapes[1]))), 2: [None] * len(op.shapes[2])}
        plan = looked_up(indices)
        if plan is None or source is None:
            return None
        looked, at = plan
        kept: Axes = [d for d in range(len(op.shape)) if d not in looked]
        metas = [i.meta["tensor"] for i in indices if i is not None]
        count = max(1 if m.dtype in (torch.bool, torch.uint8) else len(m.shape) for m in metas)
        whole = [*kept[:at], *[None] * count, *kept[at:]]
        written = op.shapes[source]
        return {source: whole[len(whole) - len(written) :]}
