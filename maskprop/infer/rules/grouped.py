"""Products of groups of rows with one matrix each: the experts of a mixture.

``y[t] = a[t] @ b[e(t)]``, where the offsets say which rows go to which matrix. Which matrix that is differs from row to
row and from input to input, so units are those that all matrices have in common:

* a unit is known, zero or needed as if every row met every matrix;
* the summed axis is one for ``a`` and all matrices, and the last axis of all matrices is the result's;
* the matrices themselves stay, since rows choose among them.

The kernel wants rows that start at multiples of 16 bytes, so a summed axis keeps a multiple of units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels
from maskprop.infer.facts import Fact, all_over
from maskprop.infer.op import Op
from maskprop.infer.rules.matmul import MatMul, Operands
from maskprop.infer.rules.registry import Rule, register

# What rows have to start at multiples of.
ALIGNMENT = 16


@register(torch.ops.aten._grouped_mm.default)
class GroupedMatMul(MatMul):
    """Rows in groups, a matrix for each group; other forms of the op are not understood."""

    def _factors(self, op: Op, facts: Sequence[Fact]) -> tuple[Operands, Fact, Fact]:
        zero = all_over(facts[1].zero, [0]).squeeze(0)  # for whichever matrix a row meets
        return Operands(), facts[0], Fact.zeros(zero)

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        return super().known(op, facts) if _is_understood(op) else Fact.unknown(len(op.shape))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        if not _is_understood(op):
            return Rule.needed(self, op, facts, needed)
        a, b, *_ = super().needed(op, facts, needed)
        everything = [torch.full((1,) * len(shape), bool(needed[0].any())) for shape in op.shapes[2:]]
        return [a, b.unsqueeze(0), *everything]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        if not _is_understood(op):
            for one in labels:
                c.pin_all(one, f"{op.target} is not understood in this form")
            return [None] * len(op.shape)
        (rows, ka), (matrices, kb, columns), *rest = labels
        for choice in (matrices, *(a for one in rest for a in one)):
            c.pin(choice, "is chosen by the rows")
        kb, columns = c.uniform(kb, [0, 2]), c.uniform(columns, [0, 1])
        ka = c.uniform(ka, [0])
        summed = c.equal(ka, None if kb is None else kb.reshape(1, -1))
        if summed is not None:
            meta = op.results[0]
            assert meta is not None
            c.multiple(summed, max(1, ALIGNMENT // meta.dtype.itemsize))
            self._terminate(op, summed, c)
        return [c.uniform(rows, [1]), None if columns is None else columns.reshape(1, -1)]

    def _leave_constants(self, op: Op, labels: Tensor, live: Tensor, c: Coupling) -> Tensor:
        return torch.zeros_like(live)  # each matrix would need a bias of its own


def _is_understood(op: Op) -> bool:
    """Whether groups of rows meet a matrix each, without a bias."""
    return [len(shape) for shape in op.shapes] == [2, 3, 1] and op.position("bias") is None
