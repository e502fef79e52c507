"""What a call leaves in a model's buffers, the next call reads: only what stays the same there is a constant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo.check import masked_reference, relative_error
from maskprop import ModelSpeedup
from maskprop.errors import TraceError


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


@dataclass
class Hidden:
    """What a call hands to the next one; it refers to itself, as an author's objects may."""

    hidden: list[Tensor]
    own: Any = None


class Streaming(nn.Module):
    """Keeps something of each call in a plain attribute, by one of the ``FORMS``."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.head, self.form = nn.Linear(6, 8), nn.Linear(8, 3), form
        self.last: Any = None
        self.all: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head(getattr(self, self.form)(x, y))

    def state(self, x: Tensor, y: Tensor) -> Tensor:
        before = torch.zeros_like(y) if self.last is None else self.last
        self.last = torch.tanh(y + before)
        return y + before

    def pair(self, x: Tensor, y: Tensor) -> Tensor:
        before = 0.0 if self.last is None else self.last[1]
        self.last = torch.ones(8), y.chunk(2)[0]
        return y + before

    def history(self, x: Tensor, y: Tensor) -> Tensor:
        self.all.append(y)
        return torch.stack(self.all).mean(0)

    def given(self, x: Tensor, y: Tensor) -> Tensor:
        before = 0.0 if self.last is None else self.last.mean()
        self.last = x
        return y + before

    def record(self, x: Tensor, y: Tensor) -> Tensor:
        before = 0.0 if self.last is None else self.last.hidden[0]
        self.last = Hidden([y + before])
        self.last.own = self.last
        return y + before

    def growing(self, x: Tensor, y: Tensor) -> Tensor:
        if self.last is not None and len(self.last) > 1:
            raise ValueError("two batches")
        self.last = y if self.last is None else self.last
        return y + self.last

    def shown(self, x: Tensor, y: Tensor) -> Tensor:
        self.last = y  # for a hook or a plot: the next call writes over it
        return y * 2

    def cached(self, x: Tensor, y: Tensor) -> Tensor:
        if self.last is None:
            self.last = torch.full((1,), 2.0).double()
        return y * self.last


@pytest.mark.parametrize("tracer", ["auto", "concrete"])
@pytest.mark.parametrize("form", ["state", "pair", "history", "given", "record", "growing"])
def test_what_attributes_remember_is_refused(form: str, tracer: str) -> None:
    model = Streaming(form).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = {"first.weight": torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 1])[:, None]}
    with pytest.raises(TraceError, match="'all'" if form == "history" else "'last'"):
        ModelSpeedup(model, torch.rand(2, 6).double(), masks, tracer=tracer).speedup_model()
    assert model.last is None
    assert model.all == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", ["shown", "cached"])
def test_what_the_next_call_does_not_need_may_be_kept(form: str) -> None:
    model = Streaming(form).double()
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 1])
    masks = {"first.weight": mask[:, None].expand(8, 6).double(), "first.bias": mask.double()}
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.rand(2, 6).double(), masks).speedup_model()
    assert model.first.out_features == 5
    for _ in range(2):
        x = torch.rand(3, 6).double()
        assert relative_error(model(x), reference(x)) < 1e-12
