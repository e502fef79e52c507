"""Every closed-form rule against the op itself, on random shapes, masks and values."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_cases import CASES
from rule_check import Arg, Case, Trial, check_couple, check_known, check_needed
from examples import examples
from torch._ops import OpOverload

from maskprop.infer.facts import Fact
from maskprop.infer.rules import find_rule
from maskprop.infer.rules.registry import registered

aten = torch.ops.aten
GPU_ONLY = {aten.cudnn_batch_norm.default}


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
    assert set(registered()) - set(CASES) - GPU_ONLY == set()


@pytest.mark.parametrize("target", CASES, ids=str)
def test_units_leave(target: OpOverload) -> None:
    """The checks see something: through most ops, some units leave under some masks."""
    rule = find_rule(target)
    assert rule is not None
    counts = []
    for i in range(40):
        r = random.Random(i)
        counts.append(check_couple(rule, Trial(CASES[target](r), r)))
        if counts[-1]:
            break
    assert any(counts) or target in NOTHING_LEAVES


NOTHING_LEAVES: set[OpOverload] = set()
