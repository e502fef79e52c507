"""Matrix products: mm, bmm, mv, dot, with or without an added bias.

Algebra, as boolean products over the summed axis k (nz = may be non-zero, known = known):

* ``unknown = nz(a) @ nz(b) - (nz(a) & known(a)) @ (nz(b) & known(b)) > 0``;
* ``needed(a)[m, k] = any_n needed(y)[m, n] & nz(b)[k, n]``, and likewise for ``b`` unless it is a weight, which
  counts as needed;
* a unit k may leave where every term ``a[m, k] * b[k, n]`` that a needed result reads is a known zero, or where
  ``a``'s unit is a known constant that a bias or a carrier can stand for;
* rows that sum to one: ``softmax @ constant = constant``, which is how a head with constant values leaves; and the
  same turned about, ``constant @ softmax.T``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from maskprop.infer.coupling import Contraction, Coupling, Labels
from maskprop.infer.facts import Fact, all_over, any_over, bool_matmul, everywhere, reduce_to
from maskprop.infer.op import Op
from maskprop.infer.places import bias_place, calls_alike, is_weight, weight_place
from maskprop.infer.rules.convolution import same_in_all_calls, unit_constants
from maskprop.infer.rules.extent import own_axes
from maskprop.infer.rules.pointwise import broadcast_labels
from maskprop.infer.rules.registry import EAGER_LIMIT, Rule, evaluate, register

aten = torch.ops.aten


@dataclass(frozen=True)
class Operands:
    """``alpha * (a @ b) + beta * bias``, as positions in the op's inputs.

    Attributes:
        row: whether ``a`` is a vector: a matrix of one row.
        column: whether ``b`` is a vector: a matrix of one column.
    """

    a: int = 0
    b: int = 1
    bias: int | None = None
    row: bool = False
    column: bool = False

    def lift_a(self, t: Tensor) -> Tensor:
        """``a``, or labels of it, with its axis of one row."""
        return t.unsqueeze(-2) if self.row else t

    def lift_b(self, t: Tensor) -> Tensor:
        """``b``, or labels of it, with its axis of one column."""
        return t.unsqueeze(-1) if self.column else t

    def lift(self, t: Tensor) -> Tensor:
        """The result with both."""
        return self.lift_a(self.lift_b(t))

    def lower(self, t: Tensor) -> Tensor:
        """The result without them."""
        t = t.squeeze(-1) if self.column else t
        return t.squeeze(-1) if self.row else t


_OPERANDS = {
    aten.mm.default: Operands(),
    aten.bmm.default: Operands(),
    aten.addmm.default: Operands(1, 2, 0),
    aten.baddbmm.default: Operands(1, 2, 0),
    aten.mv.default: Operands(column=True),
    aten.addmv.default: Operands(1, 2, 0, column=True),
    aten.dot.default: Operands(row=True, column=True),
    aten.vdot.default: Operands(row=True, column=True),
}


@register(*_OPERANDS)
class MatMul(Rule):
    """Products of matrices, of batches of them, and of vectors."""

    def _factors(self, op: Op, facts: Sequence[Fact]) -> tuple[Operands, Fact, Fact]:
        o = _OPERANDS[op.target]
        a, b = facts[o.a], facts[o.b]
        return o, a.map(o.lift_a) if o.row else a, b.map(o.lift_b) if o.column else b

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        o, a, b = self._factors(op, facts)
        own = partial(self._sums_own, op, o)
        large = math.prod(op.shape) > EAGER_LIMIT
        if all(f.plain for f in facts) or (large and all(f.total for f in facts) and own()):
            result = evaluate(op, facts)
            assert isinstance(result, Fact)
            return result
        if large and all(f.total for f in facts):
            return Fact.unknown(len(op.shape))
        product = _product(a, b, op.shapes[o.a][-1], own).map(o.lower)
        if o.bias is None:
            return product
        bias = facts[o.bias]
        known = product.known & bias.known
        if not bool(known.any()):
            return Fact.unknown(len(op.shape))
        if bool((~known | (product.zero & bias.zero)).all()):
            return Fact.zeros(known)
        value = op.arg("alpha", 1) * product.value() + op.arg("beta", 1) * bias.value()
        return Fact.of_value(value, known)

    @staticmethod
    def _sums_own(op: Op, o: Operands) -> bool:
        """Whether as many terms are summed for every input."""
        if is_weight(op.inputs[o.b]):
            return True
        return own_axes(op.inputs[o.a])[-1] or own_axes(op.inputs[o.b])[-1 if o.column else -2]

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        o, a, b = self._factors(op, facts)
        y = o.lift(needed[0])
        of_a, of_b = _averages(a, b)
        read = y & ~of_a & ~of_b
        zero_b, nz_a = b.zero.transpose(-1, -2), (~a.zero).transpose(-1, -2)
        found = [needed[0]] * len(facts)
        into_a = bool_matmul(read, ~zero_b)
        if bool(a.zero.any()):  # where both factors are zero, one of them has to stay so: the first
            into_a = into_a | (bool_matmul(read, zero_b) & a.zero)
        into_a = into_a | any_over(y & of_a, [y.ndim - 1])
        if is_weight(op.inputs[o.b]):  # large, and nothing asks which of its elements are needed
            into_b = everywhere(True, y.ndim)
        else:
            into_b = bool_matmul(nz_a, read) | any_over(y & of_b, [y.ndim - 2])
        found[o.a] = into_a.squeeze(-2) if o.row else into_a
        found[o.b] = into_b.squeeze(-1) if o.column else into_b
        if o.bias is not None:
            found[o.bias] = reduce_to(needed[0], op.shapes[o.bias])
        return found

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        o = _OPERANDS[op.target]
        la = [None if x is None else o.lift_a(x) for x in labels[o.a]]
        lb = [None if x is None else o.lift_b(x) for x in labels[o.b]]
        la, lb = [*la[:-1], *[None] * o.row, la[-1]], [*lb, *[None] * o.column]
        n = len(la)
        batch = [c.equal(c.uniform(la[0], [1, 2]), c.uniform(lb[0], [1, 2]))] if n == 3 else []
        rows, columns = c.uniform(la[-2], [n - 1]), c.uniform(lb[-1], [n - 2])
        ka, kb = c.uniform(la[-1], [n - 2]), c.uniform(lb[-2], [n - 1])
        summed = c.equal(ka, None if kb is None else kb.transpose(-1, -2))
        if summed is not None:
            self._terminate(op, summed, c)
        out = [*batch, *[rows] * (not o.row), *[columns] * (not o.column)]
        out = [None if x is None else o.lower(x) for x in out]
        if o.bias is not None:
            out = broadcast_labels(op.shape, [op.shape, op.shapes[o.bias]], [out, labels[o.bias]], c)
        return out

    def _terminate(self, op: Op, labels: Tensor, c: Coupling) -> None:
        """Which summed units the op lets go."""
        o, a, b = self._factors(op, c.facts_of(op))
        live = self._live(op, c, ~a.zero)
        if c.constants == "drop":
            live = live & ~a.known
        elif b.total and not a.plain and not is_weight(op.inputs[o.a]) and len(op.shape) == 2 and live.shape[0] == 1:
            live = live & ~self._leave_constants(op, labels, live.reshape(-1), c)
        c.end(labels, live, "is read here")

    def _live(self, op: Op, c: Coupling, terms: Tensor) -> Tensor:
        """(.., 1, k): whether some needed result reads one of the terms through k, where ``b`` may not be zero."""
        o, a, b = self._factors(op, c.facts_of(op))
        of_a, of_b = _averages(a, b)
        read = o.lift(c.needed_of(op)) & ~of_a & ~of_b
        live = any_over(bool_matmul(read, (~b.zero).transpose(-1, -2)) & terms, [a.zero.ndim - 2])
        return live.expand(*live.shape[:-1], op.shapes[o.a][-1])

    def _leave_constants(self, op: Op, labels: Tensor, live: Tensor, c: Coupling) -> Tensor:
        """Which live units are the same for every input and have a place for what they leave behind."""
        constant, foldable = self._constants(op, c, live)
        weight = weight_place(op.inputs[_OPERANDS[op.target].b], len(calls_alike(op.node)))
        kind = "bias" if constant.ndim == 1 and bias_place(op.node) else "carrier" if weight else None
        foldable = same_in_all_calls(op, constant, foldable, lambda one: self._seen(one, c))
        if kind is None or not bool(foldable.any()):
            return torch.zeros_like(live)
        c.leave(Contraction(op, labels.reshape(-1), constant, foldable, kind))
        return foldable

    def _constants(self, op: Op, c: Coupling, live: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`unit_constants`."""
        _, a, _ = self._factors(op, c.facts_of(op))
        columns = a.map(lambda t: t.transpose(0, 1).unsqueeze(0))  # units as channels, rows as space
        return unit_constants(columns, live, len(live), 1, False)

    def _seen(self, op: Op, c: Coupling) -> tuple[Tensor, Tensor, Tensor]:
        """Which units a call reads, their constants, and where they are known."""
        read = self._live(op, c, everywhere(True, 2)).reshape(-1)
        return read, *self._constants(op, c, read)


def _product(a: Fact, b: Fact, length: int, own: Callable[[], bool]) -> Fact:
    """``a @ b`` over a summed axis of ``length``, which is the model's ``own`` or may be another for other inputs."""
    nz_a, nz_b = ~a.zero, ~b.zero
    of_a, of_b = _averages(a, b)
    average = of_a | of_b
    # a term is unknown if it may be non-zero and one of its factors is unknown
    unknown = bool_matmul(nz_a & ~a.known, nz_b) | bool_matmul(nz_a, nz_b & ~b.known)
    known = average | ~unknown
    if not bool(known.any()):
        return Fact.unknown(known.ndim)
    zero = ~bool_matmul(nz_a, nz_b)
    if bool((~known | zero).all()):
        return Fact(known, known, torch.zeros((1,) * known.ndim, dtype=torch.float64))
    left = torch.where(a.known, a.value(), 0.0)
    right = torch.where(b.known, b.value(), 0.0)
    if left.shape[-1] == 1 and right.shape[-2] == 1:
        value = left * right * length
    else:
        value = left.expand(*left.shape[:-1], length) @ right.expand(*right.shape[:-2], length, right.shape[-1])
    if length > 1 and not own():  # the sum depends on the length
        known = known & (zero | average)
    value = torch.where(of_a, left.narrow(-1, 0, 1), torch.where(zero, 0.0, value))
    value = torch.where(of_b, right.narrow(-2, 0, 1), value)
    return Fact.of_value(value, known)


def _averages(a: Fact, b: Fact) -> tuple[Tensor, Tensor]:
    """Results that average one and the same known value: of a row of ``a``, of a column of ``b``.

    Both are broadcastable over the result.
    """
    if b.row_axis != b.known.ndim - 2:
        return everywhere(False, b.known.ndim), _average(a, b)
    return _average(_turned(b), _turned(a)).transpose(-1, -2), _average(a, b)


def _average(weights: Fact, b: Fact) -> Tensor:
    """Columns of ``weights @ b`` in which weights that sum to one average one and the same known value."""
    if weights.row_axis != weights.known.ndim - 1 or b.nothing:
        return everywhere(False, b.known.ndim)
    known = all_over(b.known, [b.known.ndim - 2])
    if not bool(known.any()):
        return known
    value = b.value()
    return known & (value.amax(-2, keepdim=True) == value.amin(-2, keepdim=True))


def _turned(fact: Fact) -> Fact:
    """The transposed matrices."""
    axis = fact.row_axis
    turned = fact.map(lambda t: t.transpose(-1, -2))
    return turned.with_rows(axis if axis is None or axis < fact.known.ndim - 2 else 2 * fact.known.ndim - 3 - axis)
