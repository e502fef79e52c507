"""Gated linear units: one half of an axis times the sigmoid of the other.

Algebra: as for a product whose second factor is never zero. The halves leave together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels
from maskprop.infer.facts import Fact, broadcast_shape
from maskprop.infer.op import Op
from maskprop.infer.rules.registry import Rule, register
from maskprop.infer.rules.steps import Slice


@register(torch.ops.aten.glu.default)
class Glu(Rule):
    """``a * sigmoid(b)`` of the halves of an axis."""

    def _halves(self, op: Op) -> tuple[Slice, Slice]:
        shape = op.shapes[0]
        dim = int(op.arg("dim")) % len(shape)
        middle = shape[dim] // 2
        return Slice(shape, dim, 0, middle), Slice(shape, dim, middle, shape[dim])

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        a, b = (facts[0].map(half.move) for half in self._halves(op))
        zero = a.zero.expand(broadcast_shape(a.zero.shape, b.zero.shape))
        known = (a.known & b.known) | zero
        return Fact(known, zero, lambda: torch.where(zero, 0.0, a.value() * b.value().sigmoid()), facts[0].plain)

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        first, second = self._halves(op)
        gate = needed[0] & ~facts[0].map(first.move).zero
        return [first.back(needed[0]) | second.back(gate)]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        first, second = (half.couple(list(labels[0]), c) for half in self._halves(op))
        return [c.equal(a, b) for a, b in zip(first, second, strict=True)]
