"""Inputs of other sizes than the dummy's, without verification, which sees only that one.

What a branch that masks made constant leaves varies towards padded borders; whatever sums it up over space or time
is a number of the input's size, and not a constant to fold.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.check import masked_reference
from benchmarks.zoo.randomise import randomise
from maskprop import ModelSpeedup
from tests.small import TOLERANCE, error


def branch() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1))


class TwoBranches(nn.Module):
    """One branch's inner norm is masked whole, so that its padded convolution sees constants alone."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.left, self.right, self.head = branch(), branch(), nn.Linear(10, 3)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(torch.cat([self.left(x), self.right(x)], 1).sigmoid()))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.mean((2, 3)),
    "flat": lambda y: y.flatten(2).mean(-1),
    "logsumexp": lambda y: y.flatten(2).logsumexp(-1),
    "view": lambda y: y.view(*y.shape[:2], -1).sum(2) / (y.size(2) * y.size(3)),
    "channels last": lambda y: y.permute(0, 2, 3, 1).mean((1, 2)),
    "product": lambda y: y.flatten(2) @ torch.full((y[0, 0].numel(),), 1 / y[0, 0].numel()),
    "window": lambda y: F.avg_pool2d(y, 6).flatten(2)[..., 0],
    "whole window": lambda y: F.avg_pool2d(y.clamp(min=1e-6).pow(3), y.shape[-2:]).pow(1 / 3).flatten(1),
    "stack": lambda y: torch.stack([y, y.flip(2)], 1).mean((1, 3, 4)),
}


def check(model: nn.Module, masks: dict[str, Tensor], dummy: Tensor, *others: Tensor) -> int:
    """How many parameters left; the rest computes the same on the dummy input and on others."""
    randomise(model.eval(), (dummy,))
    reference, before = masked_reference(model, masks), sum(p.numel() for p in model.parameters())
    ModelSpeedup(model, dummy, masks, verify=False).speedup_model()
    for x in (torch.randn_like(dummy), *others):
        assert error(model, reference, x) <= TOLERANCE
    return before - sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("pool", POOLS)
def test_a_branch_of_constants_under_a_sum_over_space(pool: str) -> None:
    model = TwoBranches(POOLS[pool])
    left = check(model, {"left.1.weight": torch.zeros(4)}, torch.randn(2, 3, 6, 6), torch.randn(2, 3, 9, 8))
    assert left >= 3 * 4 + 2 * 4  # the branch reads no image any more


class Strided(nn.Module):
    """Whether windows that move by two places reach over the last border, the size tells."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.side, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mid(self.first(x).relu())
        return self.head(torch.cat([F.interpolate(y.relu(), x.shape[2:]), self.side(x)], 1)).mean((2, 3)) + y.amin()


@pytest.mark.parametrize("seed", range(3))
def test_constants_at_another_border(seed: int) -> None:
    torch.manual_seed(seed)
    masks = {"first.weight": torch.zeros(4, 3, 1, 1)}
    check(Strided(), masks, torch.randn(2, 3, 6, 6), torch.randn(2, 3, 9, 9), torch.randn(1, 3, 12, 7))


class Time(nn.Module):
    """Constants beside what is another number at the ends of a sequence."""

    def __init__(self, form: Callable[[Time, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head, self.form = nn.Linear(6, 5), nn.Linear(5, 3), form
        self.token = nn.Parameter(torch.randn(1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.form(self, self.first(x).tanh()))


FORMS: dict[str, Callable[[Time, Tensor], Tensor]] = {
    "padded": lambda m, y: F.pad(y, (0, 0, 1, 1)).mean(1),
    "token": lambda m, y: torch.cat([m.token.expand(len(y), -1, -1), y], 1).mean(1),
    "shifted": lambda m, y: torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1).logsumexp(1),
    "mixed": lambda m, y: (torch.linspace(0, 1, y.shape[1]).expand(len(y), 1, -1) @ y).squeeze(1),
}


@pytest.mark.parametrize("form", FORMS)
def test_constants_beside_the_ends_of_a_sequence(form: str) -> None:
    masks = {"first.weight": torch.tensor([0.0, 0, 1, 1, 1]).reshape(5, 1)}
    check(Time(FORMS[form]), masks, torch.randn(2, 6, 6), torch.randn(2, 9, 6))


class Hops(nn.Module):
    """The same expression meets embeddings of other units at each hop."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(9, 6) for _ in range(3)])
        self.hop = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        u = self.tables[0](ids).sum(1)
        for k in range(2):
            share = (self.tables[k](ids) @ u.unsqueeze(-1)).softmax(1)
            u = self.hop(u) + (self.tables[k + 1](ids) * share).sum(1)
        return u @ self.tables[2].weight.T


@pytest.mark.parametrize("units", [(2, 4), (slice(2, 4), 4)], ids=["one", "several"])
def test_an_expression_that_is_cut_in_a_loop(units: tuple[int | slice, int]) -> None:
    """One unit is left of each table, another at each hop: no shape shows which."""
    model = Hops().eval()
    randomise(model, (torch.zeros(2, 4, dtype=torch.long),))
    kept = [torch.zeros(1, 6), torch.zeros(1, 6)]
    for row, unit in zip(kept, units, strict=True):
        row[0, unit] = 1
    rows = 1 - torch.stack(kept).amax((0, 1))
    masks = {"tables.1.weight": kept[0], "tables.2.weight": kept[1], "hop.weight": rows.reshape(6, 1)}
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randint(0, 9, (2, 4)), masks, verify=False).speedup_model()
    assert error(model, reference, torch.randint(0, 9, (3, 5))) <= TOLERANCE
