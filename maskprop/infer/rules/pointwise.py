"""Pointwise ops: result element i reads element i of each (broadcast) input.

Algebra: the result is known where all inputs are; ``0 * x = 0``, ``0 / x = 0`` and ``where``/``masked_fill`` under a
known mask are known whatever the other input is. An input is needed where the result is, except under the other
factor's known zero (when both are zero, both stay needed: each relies on the other).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels, moved
from maskprop.infer.facts import Fact, as_double, broadcast_shape, everywhere, lead, reduce_to
from maskprop.infer.op import Op
from maskprop.infer.rules.registry import EAGER_LIMIT, Rule, register, register_rule

aten = torch.ops.aten


class Pointwise(Rule):
    """Any op with the pointwise tag."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        if not facts:  # of numbers alone
            return Fact.constant(len(op.shape), op.run)
        known = facts[0].known
        for fact in facts[1:]:
            known = known & fact.known
        return self._fact(op, facts, known, None)

    def _fact(self, op: Op, facts: Sequence[Fact], known: Tensor, zero: Tensor | None) -> Fact:
        """The op's fact: ``zero`` is zero without running the op, the rest of ``known`` runs it on the values."""
        ndim = len(op.shape)
        if all(f.plain for f in facts):
            return Fact.constant(ndim, lambda: op.run(*(f.value() for f in facts)))
        known = lead(known, ndim)
        if zero is not None:
            zero = lead(zero, ndim)
            if bool((~known | zero).all()):
                return Fact.zeros(known)
        if not bool(known.any()):
            return Fact.unknown(ndim)
        if all(f.total for f in facts) and math.prod(broadcast_shape(*(f.known.shape for f in facts))) > EAGER_LIMIT:
            return Fact(known, known & False if zero is None else zero, lambda: op.run(*(f.value() for f in facts)))
        value = as_double(op.run(*(f.value() for f in facts)))
        if zero is not None and bool(zero.any()):
            value = torch.where(zero, torch.zeros((), dtype=value.dtype), value)
        return Fact.of_value(value, known)

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        return [reduce_to(needed[0], shape) for shape in op.shapes]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        return broadcast_labels(op.shape, op.shapes, labels, c)


def broadcast_labels(
    shape: Sequence[int], shapes: Sequence[Sequence[int]], labels: Sequence[Labels], c: Coupling
) -> Labels:
    """Inputs that meet along an axis leave together there; an input of size 1 takes the others' units."""
    ndim = len(shape)
    out: Labels = []
    for axis in range(ndim):
        met: list[Tensor | None] = []
        for in_shape, arrays in zip(shapes, labels, strict=True):
            own = axis - ndim + len(in_shape)
            if own < 0 or (in_shape[own] == 1 and shape[axis] != 1):
                continue
            array = arrays[own]
            met.append(moved(array, lambda a: lead(a, ndim)))
        result = met[0] if met else None
        for other in met[1:]:
            result = c.equal(result, other)
        out.append(result)
    return out


class Mul(Pointwise):
    """``a * b``: zero where either is."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        if len(facts) < 2:
            return super().known(op, facts)
        a, b = facts
        zero = a.zero | b.zero
        return self._fact(op, facts, (a.known & b.known) | zero, zero)

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        if len(facts) == 1 or op.inputs[0] is op.inputs[1]:
            return super().needed(op, facts, needed)
        a, b = facts
        return [
            reduce_to(needed[0] & (~b.zero | a.zero), op.shapes[0]),
            reduce_to(needed[0] & (~a.zero | b.zero), op.shapes[1]),
        ]


class Div(Pointwise):
    """``a / b``: zero where ``a`` is (``b`` is taken to be finite and not zero)."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        if len(facts) < 2 or op.arg("rounding_mode") is not None:
            return super().known(op, facts)
        a, b = facts
        if op.position("self") is None:  # scalar / tensor
            return super().known(op, facts)
        return self._fact(
            op,
            facts,
            (a.known & b.known) | a.zero,
            a.zero.expand(broadcast_shape(a.zero.shape, b.zero.shape)),
        )

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        found = super().needed(op, facts, needed)
        if len(facts) == 2 and op.inputs[0] is not op.inputs[1]:
            found[1] = reduce_to(needed[0] & ~facts[0].zero, op.shapes[1])
        return found


class Select(Pointwise):
    """``where(c, a, b)`` and ``masked_fill(a, c, v)``: under a known condition only one side counts."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        condition, yes, no = self._sides(op, facts)
        if condition.plain and (yes is None or yes.plain) and no.plain:
            return super().known(op, facts)
        if condition.plain and condition.known.numel() == 1 and torch.Size(op.shape).numel() > EAGER_LIMIT:
            return Fact.unknown(len(op.shape))
        if not condition.total:
            return self._whichever(op, facts)
        others = [f for f in (yes, no) if f is not None]
        if all(f.nothing for f in others) and len(others) == 2:
            return Fact.unknown(len(op.shape))
        true = condition.value().bool()
        known = torch.where(true, torch.ones((), dtype=torch.bool) if yes is None else yes.known, no.known)
        return self._fact(op, facts, known, None)

    def _whichever(self, op: Op, facts: Sequence[Fact]) -> Fact:
        """Where both sides are one and the same known number, the condition does not count."""
        _, yes, no = self._sides(op, facts)
        if no.nothing or (yes is not None and yes.nothing):
            return super().known(op, facts)
        number = torch.as_tensor(op.arg("value")).to(no.value().dtype) if yes is None else yes.value()
        known = no.known & (number == no.value())
        if yes is not None:
            known = known & yes.known
        if not bool(known.any()):
            return super().known(op, facts)
        return Fact.of_value(*(lead(t, len(op.shape)) for t in (no.value(), known)))

    def _sides(self, op: Op, facts: Sequence[Fact]) -> tuple[Fact, Fact | None, Fact]:
        if op.target is aten.where.self:
            return facts[0], facts[1], facts[2]
        return facts[1], facts[2] if len(facts) > 2 else None, facts[0]


class Cast(Pointwise):
    """A change of dtype keeps facts; floating values stay in float64."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        (fact,) = facts
        meta = op.results[0]
        source = op.inputs[0].meta["tensor"].dtype
        if meta is not None and meta.dtype.is_floating_point and source.is_floating_point:
            return fact
        return super().known(op, facts)


class Copy(Pointwise):
    """``copy(target, source)``: the source, in the target's shape."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        return facts[1].map(lambda t: lead(t, len(op.shape)))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        return [needed[0] & False, reduce_to(needed[0], op.shapes[1])]


POINTWISE = Pointwise()
for _target in (aten.mul.Tensor, aten.mul.Scalar):
    register_rule(_target, Mul())
for _target in (aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode):
    register_rule(_target, Div())
for _target in (aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
    register_rule(_target, Select())
for _target in (aten._to_copy.default, torch.ops.prims.convert_element_type.default):
    register_rule(_target, Cast())
register_rule(aten.copy.default, Copy())
register_rule(aten.fill.Tensor, Copy())
for _target in (aten.hardswish.default, aten.rsub.Tensor, aten.floor_divide.default, aten.complex.default):
    register_rule(_target, POINTWISE)  # which torch forgot to tag


@register(aten._prelu_kernel.default)
class Prelu(Pointwise):
    """``x`` or ``w * x``: pointwise, and zero stays zero."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        slopes, w = op.shapes[1], facts[1]
        x = facts[0].map(lambda t: t.expand(broadcast_shape(t.shape, slopes)))  # the kernel does not broadcast itself
        return self._fact(op, (x, w), (x.known & w.known) | x.zero, x.zero)


@register(aten.tril.default, aten.triu.default)
class Triangle(Pointwise):
    """Of the last two axes a triangle stays and the rest is zero, as in a product with a table: neither can shrink."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        (fact,) = facts
        if fact.total or fact.nothing:
            found = Rule.known(self, op, facts)
            assert isinstance(found, Fact)
            return found
        outside = lead(op.run(torch.ones(op.shape[-2:])) == 0, len(op.shape))
        value = torch.where(outside, torch.zeros((), dtype=fact.value().dtype), fact.value())
        known = fact.known | outside
        return Fact.of_value(value, known.expand(broadcast_shape(known.shape, value.shape)))

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        ndim = len(op.shape)
        for axis in (ndim - 2, ndim - 1):
            c.pin(labels[0][axis], "is an axis of a triangle")
        rest = [c.uniform(a, [ndim - 2, ndim - 1]) for a in labels[0][:-2]]
        return [*rest, None, None]


@register(
    aten.zeros.default, aten.ones.default, aten.full.default, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
        aten.scalar_tensor.default,
    aten.fill.Scalar, aten.zero.default,
)  # fmt: skip
class Uniform(Rule):
    """One number everywhere. Its axes are as free as what they meet, since every element is the same."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        name = op.target._schema.name.split("::")[1]
        number = op.arg("fill_value", op.arg("value", op.arg("s", 1 if "ones" in name else 0)))
        meta = op.results[0]
        assert meta is not None
        dtype = torch.float64 if meta.dtype.is_floating_point else meta.dtype
        return Fact.of_value(torch.full((1,) * len(op.shape), number, dtype=dtype))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        return [everywhere(False, len(shape)) for shape in op.shapes]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        if labels and op.arg("size") is None:
            return list(labels[0])  # made in the likeness of its input
        return c.axes(op.shape)


@register(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
class Undefined(Uniform):
    """Memory that is yet to be written to: whatever it holds, nobody relies on it."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        return Fact.unknown(len(op.shape))
