"""Random numbers: each element is drawn by itself, so that fewer elements are drawn alike.

Algebra: nothing is known of what is drawn. Its units are those of the tensor in whose likeness it is drawn, or of the
parameters of its distribution, of which an element needs its own; of the former nothing is needed. What is drawn by
size has axes as free as what they meet. The rest of the model gets the same in distribution, not in numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels
from maskprop.infer.facts import Fact, everywhere
from maskprop.infer.op import Op
from maskprop.infer.rules.pointwise import Pointwise
from maskprop.infer.rules.registry import register, unknowns

aten = torch.ops.aten


@register(
    aten.bernoulli.default, aten.bernoulli.Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor,
    aten.normal.Tensor_Tensor, aten.poisson.default,
)  # fmt: skip
class Draw(Pointwise):
    """Drawn from distributions whose parameters are tensors."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        return unknowns(op)[0]


@register(
    aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype,
    aten.bernoulli.p, aten.uniform.default, aten.normal_functional.default, aten.exponential.default,
    aten.geometric.default, aten.cauchy.default, aten.log_normal.default,
)  # fmt: skip
class DrawLike(Draw):
    """Drawn in the likeness of a tensor, or in its place: its own numbers do not matter."""

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        return [everywhere(False, len(shape)) for shape in op.shapes]


@register(aten.rand.default, aten.randn.default, aten.randint.default, aten.randint.low, aten.normal.float_float)
class DrawSize(DrawLike):
    """Drawn by size."""

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        return c.axes(op.shape)
