"""Rules that are broken on purpose: the property tests of the rules catch each of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from rule_cases import CASES
from rule_check import Trial, check_couple, check_known, check_needed
from torch import Tensor
from torch._ops import OpOverload

from maskprop.infer.coupling import Coupling, Labels
from maskprop.infer.facts import Fact, all_over
from maskprop.infer.op import Op
from maskprop.infer.rules import Rule, find_rule
from maskprop.infer.rules.convolution import Convolution
from maskprop.infer.rules.joining import Cat, Repeat
from maskprop.infer.rules.matmul import MatMul
from maskprop.infer.rules.movement import Parts, _split_parts
from maskprop.infer.rules.norms import BatchNorm, GroupNorm, LayerNorm, Softmax
from maskprop.infer.rules.pointwise import Mul, Pointwise
from maskprop.infer.rules.reductions import Reduction
from maskprop.infer.rules.spatial import PerChannel

aten = torch.ops.aten


class ReluForgetsZero(Pointwise):
    """A known number comes out of it as it went in."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        return facts[0]


class SigmoidKeepsZero(Pointwise):
    """Zero is mapped to one half, not to zero."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        return Fact.zeros(facts[0].zero)


class ProductOfZeros(Mul):
    """Where both factors are zero, neither is needed, although each relies on the other."""

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        found = super().needed(op, facts, needed)
        both = facts[0].zero & facts[1].zero
        return [n & ~both if n.ndim == both.ndim else n for n in found]


class SumIsKnownByOneTerm(Pointwise):
    """One known term is taken for the sum."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        known = facts[0].known | facts[1].known
        return Fact.of_value(torch.where(known, facts[0].value() + facts[1].value(), 0.0), known)


class PaddedConstants(Convolution):
    """A constant channel comes out constant at the borders, too."""

    def _layout(self, op: Op) -> tuple[int, bool, bool]:
        groups, transposed, _ = super()._layout(op)
        return groups, transposed, False


class GroupsMixed(Convolution):
    """The second group is taken to read the first group's inputs."""

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        x, *rest = super().needed(op, facts, needed)
        return [x.flip(1), *rest]


class CatBackwards(Cat):
    """The parts are joined in the wrong order."""

    def _join(self, op: Op, tensors: Sequence[Tensor]) -> Tensor:
        return super()._join(op, tensors).flip(self._dim(op))


class CatLabelsBackwards(Cat):
    """The labels of the parts are joined in the wrong order."""

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        out, dim = super().couple(op, labels, c), self._dim(op)
        return [a.flip(dim) if i == dim and a is not None else a for i, a in enumerate(out)]


class RowsTurned(MatMul):
    """The pattern of the weight is not transposed on the way back."""

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        found = super().needed(op, facts, needed)
        return [n.flip(-1) for n in found]


class NothingIsRead(MatMul):
    """Every summed unit may leave."""

    def _terminate(self, op: Op, labels: Tensor, c: Coupling) -> None:
        c.read.append(labels)


class UntiedContraction(MatMul):
    """The two summed axes do not leave together."""

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        c.read += [a for ls in labels for a in ls if a is not None]
        return [labels[0][0], labels[1][1]]


class NormWithoutStatistics(LayerNorm):
    """A pruned element is taken to leave its neighbours' statistics alone."""

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> tuple[Labels, ...]:
        out: Labels = [c.equal(labels[0][-1], ls[0]) if ls else None for ls in labels[1:]]
        return tuple([*labels[0][:-1], out[0] if out else labels[0][-1]] for _ in op.results)


class ZeroComesOutZero(BatchNorm):
    """A channel of zeros stays zero, whatever mean and bias say."""

    def known(self, op: Op, facts: Sequence[Fact]) -> tuple[Fact, ...]:
        zero = all_over(facts[0].zero, [0, *range(2, facts[0].zero.ndim)])
        first, *rest = (Fact.unknown(0 if m is None else len(m.shape)) for m in op.results)
        return Fact.zeros(zero) if bool(zero.any()) else first, *rest


class ChannelsOfAGroup(GroupNorm):
    """Single channels of a group may leave."""

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> tuple[Labels, ...]:
        before = len(c.pins)
        found = super().couple(op, labels, c)
        del c.pins[before:]
        return found


class MeanIgnoresZeros(Reduction):
    """A mean is taken for a sum: it does not count the zeros."""

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels | tuple[Labels, ...]:
        before = len(c.pins)
        found = super().couple(op, labels, c)
        del c.pins[before:]
        return found


class RowsShrink(Softmax):
    """The axis of a softmax shrinks."""

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        return list(labels[0])


class AverageOfPadding(PerChannel):
    """An average over zero padding keeps a constant."""

    def _keeps_constants(self, op: Op) -> bool:
        return True


class RepeatEach(Repeat):
    """Tiles are taken for runs."""

    def _tile(self, op: Op, t: Tensor) -> Tensor:
        for axis, n in enumerate(op.arg("repeats")[len(op.arg("repeats")) - t.ndim :]):
            t = t.repeat_interleave(n, axis) if t.shape[axis] > 1 else t
        return t.reshape((1,) * (len(op.shape) - t.ndim) + t.shape)


class FirstPartTwice(Parts):
    """Every part is taken for the first."""

    def known(self, op: Op, facts: Sequence[Fact]) -> tuple[Fact, ...]:
        first, *rest = super().known(op, facts)
        shapes = [m.shape for m in op.results if m is not None]
        return first, *(first if shape == shapes[0] else f for f, shape in zip(rest, shapes[1:], strict=True))


FAULTS: list[tuple[OpOverload, Rule]] = [
    (aten.relu.default, ReluForgetsZero()),
    (aten.sigmoid.default, SigmoidKeepsZero()),
    (aten.mul.Tensor, ProductOfZeros()),
    (aten.add.Tensor, SumIsKnownByOneTerm()),
    (aten.convolution.default, PaddedConstants()),
    (aten.convolution.default, GroupsMixed()),
    (aten.cat.default, CatBackwards()),
    (aten.cat.default, CatLabelsBackwards()),
    (aten.mm.default, RowsTurned()),
    (aten.mm.default, NothingIsRead()),
    (aten.mm.default, UntiedContraction()),
    (aten.native_layer_norm.default, NormWithoutStatistics()),
    (aten.native_batch_norm.default, ZeroComesOutZero()),
    (aten.native_group_norm.default, ChannelsOfAGroup()),
    (aten.mean.dim, MeanIgnoresZeros()),
    (aten._softmax.default, RowsShrink()),
    (aten.avg_pool2d.default, AverageOfPadding()),
    (aten.repeat.default, RepeatEach()),
    (aten.split_with_sizes.default, FirstPartTwice(_split_parts)),
]


def caught(target: OpOverload, rule: Rule, examples: int = 150) -> str:
    """What the checks say of a rule, or nothing."""
    for i in range(examples):
        r = random.Random(i)
        trial = Trial(CASES[target](r), r)
        for check in (check_known, check_needed, check_couple):
            try:
                check(rule, trial)
            except Exception as error:  # a broken rule may also trip over its own shapes
                return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(("target", "rule"), FAULTS, ids=lambda x: type(x).__name__ if isinstance(x, Rule) else "")
def test_a_broken_rule_is_caught(target: OpOverload, rule: Rule) -> None:
    assert caught(target, rule)


@pytest.mark.parametrize("target", dict.fromkeys(t for t, _ in FAULTS), ids=str)
def test_the_rule_itself_is_not(target: OpOverload) -> None:
    rule = find_rule(target)
    assert rule is not None
    assert caught(target, rule, examples=25) == ""
