"""Fourier transforms, and complex numbers seen as pairs.

Algebra: a transform mixes the axes that it runs over and leaves the others alone; zero everywhere along those axes
comes out as zero. A complex number is a pair of real ones on a new last axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels
from maskprop.infer.facts import Fact, all_over, any_over
from maskprop.infer.op import Op
from maskprop.infer.rules.registry import Rule, evaluate, register

aten = torch.ops.aten


@register(aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default)
class Fourier(Rule):
    """A transform over the axes ``dim``, to or from complex numbers."""

    def _dims(self, op: Op) -> list[int]:
        return [d % len(op.shape) for d in op.arg("dim")]

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        if facts[0].total:
            return evaluate(op, facts)
        return Fact.zeros(all_over(facts[0].zero, self._dims(op)))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        return [any_over(needed[0], self._dims(op))]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        dims = self._dims(op)
        for d in dims:
            c.pin(labels[0][d], "is an axis of a Fourier transform")
        return [None if i in dims else c.uniform(a, dims) for i, a in enumerate(labels[0])]


@register(aten.view_as_real.default)
class AsReal(Rule):
    """``(..., ) complex -> (..., 2)``."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        return evaluate(op, facts) if facts[0].total else Fact.zeros(facts[0].zero.unsqueeze(-1))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        return [any_over(needed[0], [len(op.shape) - 1]).squeeze(-1)]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        return [*(None if a is None else a.unsqueeze(-1) for a in labels[0]), None]


@register(aten.view_as_complex.default)
class AsComplex(Rule):
    """``(..., 2) -> (..., ) complex``."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        last = len(op.shape)
        return evaluate(op, facts) if facts[0].total else Fact.zeros(all_over(facts[0].zero, [last]).squeeze(-1))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        return [needed[0].unsqueeze(-1)]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        last = len(op.shape)
        c.pin(labels[0][last], "holds real and imaginary parts")
        passing = (c.uniform(a, [last]) for a in labels[0][:last])
        return [None if a is None else a.squeeze(-1) for a in passing]
