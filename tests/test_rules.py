"""Every closed-form rule against the op itself, on random shapes, masks and values."""

from __future__ import annotations

import random

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from rule_cases import CASES
from rule_check import Trial, check_couple, check_known, check_needed
from torch._ops import OpOverload

from maskprop.infer.rules import find_rule, registered
from maskprop.infer.rules.draws import Draw

aten = torch.ops.aten
GPU_ONLY = {aten.cudnn_batch_norm.default}
SINGLE_ONLY = {aten._grouped_mm.default}  # its kernel takes no doubles, in which these checks compute: test_grouped.py
UNDEFINED = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}  # no numbers to compare
DRAWS = {op for op in registered() if isinstance(find_rule(op), Draw)}  # nor here: test_surroundings.py
# They read no axis that could shrink, or all of them.
NOTHING_LEAVES = {
    aten.zeros.default, aten.ones.default, aten.full.default, aten.scalar_tensor.default, aten.mean.default,
    aten.any.default, aten.all.default, aten.max.default, aten.min.default,
}  # fmt: skip


@pytest.mark.parametrize("target", CASES, ids=str)
@examples(8)
@given(r=st.randoms(use_true_random=False))
def test_rule(target: OpOverload, r: random.Random) -> None:
    rule = find_rule(target)
    assert rule is not None
    trial = Trial(CASES[target](r), r)
    check_known(rule, trial)
    check_needed(rule, trial)
    check_couple(rule, trial)


def test_every_rule_has_cases() -> None:
    assert set(registered()) - set(CASES) == GPU_ONLY | SINGLE_ONLY | UNDEFINED | DRAWS


@pytest.mark.parametrize("target", sorted(set(CASES) - NOTHING_LEAVES, key=str), ids=str)
def test_units_leave(target: OpOverload) -> None:
    """The checks see something: through each op, some units leave under some masks."""
    rule = find_rule(target)
    assert rule is not None
    trials = (Trial(CASES[target](r), r) for r in map(random.Random, range(40)))
    assert any(check_couple(rule, trial) for trial in trials)
