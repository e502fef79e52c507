"""Experts whose rows meet one matrix each in a grouped product."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskprop import ModelSpeedup

WIDTH, HIDDEN, EXPERTS = 8, 16, 3


class Experts(nn.Module):
    """Each row goes to the expert that a router likes best, and comes back to its place."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        chosen, order = torch.sort(self.router(x).argmax(-1))
        offsets = F.one_hot(chosen, EXPERTS).sum(0).cumsum(0).int()
        hidden = F.grouped_mm(x[order], self.up.transpose(1, 2), offs=offsets).relu()
        y = F.grouped_mm(hidden, self.down.transpose(1, 2), offs=offsets)
        return x + y[order.argsort()]


@pytest.mark.parametrize(("masked", "left"), [(8, 8), (6, 12), (3, 16)])
@pytest.mark.parametrize("rows", [True, False])
def test_hidden_units_leave_in_multiples_of_what_the_kernel_takes(masked: int, left: int, rows: bool) -> None:
    torch.manual_seed(0)
    model = Experts().eval()
    keep = (torch.randperm(HIDDEN) >= masked).float()
    name, mask = ("up", keep.reshape(1, -1, 1)) if rows else ("down", keep.reshape(1, 1, -1))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.get_parameter(name).mul_(mask)
    ModelSpeedup(model, torch.randn(10, WIDTH), {name: mask}).speedup_model()
    assert tuple(model.up.shape) == (EXPERTS, left, WIDTH)
    assert tuple(model.down.shape) == (EXPERTS, WIDTH, left)
    for count in (1, 7, 12):
        x = torch.randn(count, WIDTH)
        with torch.no_grad():
            assert torch.allclose(model(x), reference(x), atol=1e-4)


def test_a_unit_that_one_expert_alone_lost_stays() -> None:
    torch.manual_seed(0)
    model = Experts().eval()
    mask = torch.ones(EXPERTS, HIDDEN, 1)
    mask[1, :8] = 0
    speedup = ModelSpeedup(model, torch.randn(10, WIDTH), {"up": mask})
    assert tuple(speedup.speedup_model().up.shape) == (EXPERTS, HIDDEN, WIDTH)
