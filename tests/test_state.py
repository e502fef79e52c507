"""What a call leaves in a model's buffers, the next call reads: only what stays the same there is a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo.check import masked_reference, relative_error
from maskprop import ModelSpeedup


class Remembering(nn.Module):
    """A layer that loses units and one that reads them; between them a ``form`` that remembers."""

    mean: Tensor
    count: Tensor

    def __init__(self, form: Callable[[Any, Tensor], Tensor], start: float) -> None:
        super().__init__()
        self.first, self.head, self.form = nn.Linear(6, 8), nn.Linear(8, 3), form
        self.register_buffer("mean", torch.full((8,), start))
        self.register_buffer("count", torch.full((), start))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.form(self, self.first(x)))


def averaged(m: Remembering, y: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(0.1 * y.mean(0))
    return y - m.mean


def replaced(m: Remembering, y: Tensor) -> Tensor:
    m.mean = 0.9 * m.mean + 0.1 * y.mean(0)
    return y - m.mean


def in_part(m: Remembering, y: Tensor) -> Tensor:
    z = y + m.mean
    m.mean[2:] += y[0, 2:]
    return z


def through_data(m: Remembering, y: Tensor) -> Tensor:
    z = y + m.mean
    m.mean.data += 1
    return z


def counted(m: Remembering, y: Tensor) -> Tensor:
    m.count = m.count + 1
    return y * m.count


FORMS = {f.__name__: f for f in (averaged, replaced, in_part, through_data, counted)}


def speed_up(form: str, start: float, names: list[str]) -> tuple[int, float]:
    """How many units left, and the largest error over some calls one after another."""
    torch.manual_seed(0)
    model = Remembering(FORMS[form], start).double().eval()
    masks = {n: (torch.arange(8) % 2).reshape(-1, *[1] * (model.get_parameter(n).ndim - 1)) for n in names}
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(2, 6).double(), masks, verify=False).speedup_model()
    batches = [torch.randn(n, 6).double() for n in (2, 5, 1, 3)]
    return 8 - model.first.out_features, max(relative_error(model(x), reference(x)) for x in batches)


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_constants_beside_what_changes_with_every_call(form: str, start: float) -> None:
    _, error = speed_up(form, start, ["first.weight"])
    assert error <= 1e-9


@pytest.mark.parametrize("form", ["averaged", "replaced"])
def test_what_is_zero_before_a_call_and_after_it_leaves(form: str) -> None:
    left, error = speed_up(form, 0.0, ["first.weight", "first.bias"])
    assert left == 4
    assert error <= 1e-9


@pytest.mark.parametrize("form", ["averaged", "replaced", "through_data"])
def test_what_a_call_turns_into_something_else_stays(form: str) -> None:
    left, error = speed_up(form, 0.5, ["first.weight", "first.bias"])
    assert left == 0
    assert error <= 1e-9


class Neighbours(nn.Module):
    """Sums over the neighbours in a sparse graph, and holds a buffer that nobody set."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("near", (torch.rand(5, 5) > 0.5).float().to_sparse())
        self.register_buffer("unset", torch.full((2,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sparse.mm(self.near, self.first(x)).relu())


def test_buffers_of_any_layout_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    model, rows = Neighbours().eval(), (torch.arange(8) % 2).float()
    masks = {"first.weight": rows[:, None], "first.bias": rows}
    reference, near = masked_reference(model, masks), model.near
    ModelSpeedup(model, torch.randn(5, 6), masks).speedup_model()
    x = torch.randn(5, 6)
    assert model.near is near
    assert relative_error(model(x), reference(x)) <= 1e-6
