"""Numbers that ``forward`` makes of its input's sizes: where they meet what a masked unit leaves, that is no constant.

Without verification, which sees the dummy's sizes only, and in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskprop.speedup
from benchmarks.zoo.check import masked_reference, relative_error
from maskprop import ModelSpeedup
from maskprop.graph.resize import at_other_sizes
from maskprop.graph.trace import Inputs, trace


class Layers(nn.Module):
    """A linear layer that loses units and one that reads them; between them whatever ``form`` does."""

    def __init__(self, form: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.mid, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.key, self.cell, self.recurrent = nn.Linear(6, 8), nn.GRUCell(6, 8), nn.LSTM(6, 8, batch_first=True)
        self.table = nn.Parameter(torch.ones(16, 8))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.form(self, x))


class Pixels(nn.Module):
    """The same with convolutions."""

    def __init__(self, form: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head, self.form = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), form

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.form(x, self.first(x).relu()))


def over_time(m: Layers, x: Tensor) -> Tensor:
    state = x.new_zeros(len(x), 8)
    for t in range(x.shape[1]):
        state = m.cell(x[:, t], state)
    return state


def summed(m: Layers, x: Tensor) -> Tensor:
    y = total = m.first(x).relu()
    for _ in range(x.shape[1]):
        total = total + y
    return total


def in_halves(m: Layers, x: Tensor) -> Tensor:
    """Other ways for other sizes, with a number on each."""
    y = m.first(x).sigmoid()
    return (y * 2 + x.shape[1] if x.shape[1] % 2 else y.roll(1, 1).exp() * x.shape[1]).tanh()


TIME: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "root of the length": lambda m, x: m.first(x).relu() * math.sqrt(x.shape[1]),
    "plus the batch": lambda m, x: (m.first(x) + x.shape[0]).relu(),
    "tensor": lambda m, x: m.first(x).relu() * torch.tensor(float(x.shape[1])),
    "full": lambda m, x: m.first(x).relu() * x.new_full((1, x.shape[1], 1), x.shape[1]),
    "mean of places": lambda m, x: m.first(x).relu() * torch.arange(x.shape[1]).double().mean(),
    "power": lambda m, x: m.first(x).sigmoid() ** (1 / x.shape[1]),
    "clamped": lambda m, x: (m.first(x) * 20).clamp(max=x.shape[1]),
    "below the length": lambda m, x: (m.first(x) - x.shape[1] / 8).relu(),
    "compared": lambda m, x: torch.where(m.first(x) * 8 > x.shape[1], m.first(x), m.key(x)),
    "at most": lambda m, x: torch.minimum(m.first(x) * 20, torch.full((8,), float(x.shape[1])).double()),
    "at most a tensor": lambda m, x: torch.minimum(m.first(x) * 20, torch.tensor(x.shape[1]) * 1.0),
    "weighted sum": lambda m, x: torch.add(m.first(x), m.first(x).relu(), alpha=x.shape[1]),
    "linear attention": lambda m, x: m.first(x).relu() @ (m.key(x).softmax(1).mT @ m.mid(m.first(x)) / x.shape[1]),
    "scaled scores": lambda m, x: (
        (m.first(x) @ m.key(x).mT / math.log(1 + x.shape[1])).softmax(-1) @ m.mid(m.first(x)) * x.shape[1] ** 0.5
    ),
    "softmax over units and time": lambda m, x: m.first(x).mT.flatten(1).softmax(-1).unflatten(1, (8, -1)).mT,
    "several sums": summed,
    "cell": over_time,
    "layers": lambda m, x: m.recurrent(x)[0][:, -1],
    "another way": in_halves,
    "row of a table": lambda m, x: m.first(x).relu() + m.table[x.shape[1] - 1],
    "mean of rows": lambda m, x: m.first(x).relu() * m.table[: x.shape[1]].mean(0),
    "length looked up": lambda m, x: m.first(x).relu() + F.embedding(torch.tensor(x.shape[1] - 1), m.table),
    "part of a table": lambda m, x: m.first(x).relu() + m.table.split(x.shape[1])[0].mean(0),
    "rows from a length on": lambda m, x: m.first(x).relu() + m.table[x.shape[1] :].sum(0),
    "diagonal": lambda m, x: m.first(x).relu() + m.table.tril(x.shape[1] - 8).mean(0),
    "largest": lambda m, x: m.first(x).relu() + m.table.cumsum(0).kthvalue(x.shape[1], 0).values,
    "repeated row": lambda m, x: m.first(x).relu() + m.table[0].expand(x.shape[1], 8).cumsum(0).mean(0),
}
SPACE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "height": lambda x, y: y * x.shape[2],
    "aspect": lambda x, y: y * (x.shape[2] / x.shape[3]),
    "divisor": lambda x, y: F.avg_pool2d(y, y.shape[2:], divisor_override=x.shape[2]),
    "windows": lambda x, y: F.avg_pool2d(y, 2, divisor_override=1) / (x.shape[2] // 2),
    "border": lambda x, y: F.pad(y, (1, 1, 1, 1), value=float(x.shape[3])),
}


def half(model: nn.Module) -> dict[str, Tensor]:
    """Half of the rows of every layer but the last, the biases kept."""
    rows = {n: torch.arange(len(p)) % 2 for n, p in model.named_parameters() if p.ndim > 1 and n != "head.weight"}
    return {n: row.double().reshape(-1, *[1] * (model.get_parameter(n).ndim - 1)) for n, row in rows.items()}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All weights that read the input, the biases kept."""
    names = [n for n, p in model.named_parameters() if p.ndim > 1 and p.shape[1] in (3, 6)]
    return {n: torch.zeros_like(model.get_parameter(n)) for n in names}


def compact(model: nn.Module, masks: dict[str, Tensor], dummy: Tensor, **options: Any) -> tuple[nn.Module, int]:
    """The masked model, and how many parameters the compact one, the model itself, has fewer."""
    reference, before = masked_reference(model, masks), sum(p.numel() for p in model.parameters())
    ModelSpeedup(model, dummy, masks, verify=False, **options).speedup_model()
    return reference, before - sum(p.numel() for p in model.parameters())


def check(model: nn.Module, masks: dict[str, Tensor], *shapes: tuple[int, ...]) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5 + 0.2)
    reference, _ = compact(model, masks, torch.randn(shapes[0], dtype=torch.float64))
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        assert relative_error(model(x), reference(x)) <= 1e-9, shape


@pytest.mark.parametrize("masks", [half, whole])
@pytest.mark.parametrize("form", TIME)
def test_other_lengths_and_batches(form: str, masks: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    model = Layers(TIME[form]).double().eval()
    check(model, masks(model), (2, 6, 6), (3, 6, 6), (1, 9, 6), (2, 3, 6), (5, 16, 6))


@pytest.mark.parametrize("masks", [half, whole])
@pytest.mark.parametrize("form", SPACE)
def test_other_images(form: str, masks: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    model = Pixels(SPACE[form]).double().eval()
    check(model, masks(model), (3, 3, 6, 6), (1, 3, 6, 6), (3, 3, 9, 8), (2, 3, 4, 12))


class Mean(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head(y.sum(1) / (y.numel() / len(x) / 8))


class Added(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head(torch.add(y, y.relu(), alpha=y.numel() / len(x) / 48))


class Written(Layers):
    """What ``form`` is, no source tells."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.form(self, x))


@pytest.mark.parametrize("kind", [Mean, Added, Written])
def test_a_number_of_both_the_length_and_the_units(kind: Callable[[Any], nn.Module]) -> None:
    """A forward that divides by another number does so at every length."""
    model = kind(lambda m, x: (y := m.first(x)).sum(1) / (y.numel() / x.shape[0] / 8)).double().eval()
    masks = {"first.weight": half(model)["first.weight"], "first.bias": (torch.arange(8) % 2).double()}
    check(model, masks, (2, 6, 6), (3, 6, 6), (1, 12, 6), (2, 3, 6))
    assert model.get_parameter("first.bias").numel() == 4


TABLES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "slice": lambda m, x: m.first(x) * m.table[: x.shape[1]],
    "indices": lambda m, x: m.first(x) * m.table[torch.arange(x.shape[1])],
    "embedding": lambda m, x: m.first(x) * F.embedding(torch.arange(x.shape[1]), m.table),
    "and one more": lambda m, x: m.first(x) * m.table[: x.shape[1]].mean(0) + m.table[x.shape[1]],
}


@pytest.mark.parametrize("form", TABLES)
def test_rows_of_a_table_that_only_a_longer_input_reads(form: str) -> None:
    """All that the dummy reads is masked."""
    model = Layers(TABLES[form]).double().eval()
    rows = (torch.arange(16) > 6).double().reshape(16, 1)
    check(model, {"table": rows}, (2, 6, 6), (3, 6, 6), (1, 9, 6), (2, 3, 6))
    zero = {"table": (torch.arange(8) % 2).double()}
    assert compact(Layers(TABLES[form]).double().eval(), zero, torch.randn(2, 6, 6).double())[1] == 4 * (6 + 1 + 16 + 3)


class Places(nn.Module):
    """Mixes at most 16 places, of which as many are taken as the input has."""

    def __init__(self, take: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.first, self.mix, self.head, self.take = nn.Linear(6, 8), nn.Linear(16, 16), nn.Linear(8, 3), take

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.first(x).relu(), (0, 0, 0, 16 - x.shape[1]))
        return self.head(self.take(self.mix(y.mT), x.shape[1]).mT.relu())


PLACES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "first": lambda y, n: y[..., :n],
    "after turning": lambda y, n: y.mT[:, :n].mT,
    "last": lambda y, n: y[..., -n:],
    "one": lambda y, n: y[..., n - 1 : n],
    "another one": lambda y, n: y.select(-1, n - 1)[..., None],
    "all behind": lambda y, n: y[..., n - 1 :].mean(-1, keepdim=True),
    "of several": lambda y, n: y.tanh().mul(2)[..., :n],
}


def early(model: nn.Module) -> dict[str, Tensor]:
    """The first half of the places."""
    return {"mix.weight": (torch.arange(16) > 7).double()[:, None]}


@pytest.mark.parametrize("masks", [half, whole, early])
@pytest.mark.parametrize("take", PLACES)
def test_places_that_only_a_longer_input_needs(take: str, masks: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    model = Places(PLACES[take]).double().eval()
    check(model, masks(model), (2, 6, 6), (3, 6, 6), (1, 9, 6), (2, 3, 6), (2, 16, 6))


def test_places_that_no_input_needs() -> None:
    """A part that is taken of every input."""
    model = Places(lambda y, n: y[..., 2:6]).double().eval()
    reference, left = compact(model, early(model), torch.randn(2, 6, 6).double())
    assert left > 16 * 17
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    assert relative_error(model(x), reference(x)) <= 1e-9


@pytest.mark.parametrize("shape", [(1, 1, 6), (3, 1, 6), (6, 6, 6), (8, 8, 6)])
def test_a_dummy_of_any_shape(shape: tuple[int, ...]) -> None:
    """Also a sequence of one, and sizes that are equal by chance."""
    model = Layers(lambda m, x: m.first(x) * x.shape[1] - x.shape[0]).double().eval()
    check(model, {"first.weight": half(model)["first.weight"]}, shape, (2, 6, 6), (3, 4, 6), (1, 9, 6))


def test_what_a_hook_does_to_a_layer() -> None:
    model = Layers(lambda m, x: m.first(x)).double().eval()
    model.first.register_forward_hook(lambda module, args, y: y * y.shape[1])
    check(model, {"first.weight": half(model)["first.weight"]}, (2, 6, 6), (3, 4, 6))


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """The inputs of every trace that a speedup asks for."""
    asked: list[Inputs] = []

    def counting(model: nn.Module, inputs: Inputs, *args: Any) -> Any:
        asked.append(inputs)
        return trace(model, inputs, *args)

    monkeypatch.setattr(maskprop.speedup, "trace", counting)
    return asked


LITERALS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "half": lambda m, x: m.first(x).relu() * 0.5,
    "by units": lambda m, x: m.first(x) * m.first(x).shape[-1] ** -0.5,
    "clamped mean": lambda m, x: m.first(x).clamp(-6, 6).mean(1),
}


@pytest.mark.parametrize("form", LITERALS)
def test_other_numbers_are_folded_and_tried_at_another_size(form: str, traces: list[Inputs]) -> None:
    model = Layers(LITERALS[form]).double().eval()
    reference, left = compact(model, {"first.weight": half(model)["first.weight"]}, torch.randn(2, 6, 6).double())
    assert left == 4 * 6 + 4 + 4 * 3
    assert len(traces) > 1
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    assert relative_error(model(x), reference(x)) <= 1e-9


@pytest.mark.parametrize("bias", [False, True], ids=["the bias stays", "no constants"])
def test_nothing_is_traced_again_without_need(bias: bool, traces: list[Inputs]) -> None:
    """No constants are left; or they meet no number but those of torch's own layers."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.AvgPool2d(2), nn.Conv2d(8, 2, 1)).eval()
    scaled = Layers(lambda m, x: m.first(x) * x.shape[1]).eval()
    rows = torch.arange(8) % 2
    convolution = {"0.weight": rows.reshape(8, 1, 1, 1)}
    turned = Layers(lambda m, x: m.first(x).relu() + m.mid.bias[:, None].squeeze(1)).eval()
    compact(turned, {"first.weight": rows.reshape(8, 1)}, torch.randn(2, 6, 6))
    assert len(traces) == 1
    traces.clear()
    if bias:
        compact(scaled, {"first.weight": rows.reshape(8, 1), "first.bias": rows}, torch.randn(2, 6, 6))
    else:
        compact(model, convolution, torch.randn(1, 3, 8, 8))
    assert len(traces) == 1


class Limited(nn.Module):
    """A sequence is at most as long as the dummy's, an image of the dummy's size, a batch whatever."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes, self.units = sizes, nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if x.shape[1] > 4 or x.shape[2] != self.sizes[2] or mask.shape[-1] != x.shape[1]:
            raise ValueError(f"cannot take {x.shape}")
        return self.units(x) * mask.unsqueeze(-1)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_every_size_that_may_change_does(batch: int) -> None:
    """Of the channels, the length and the batch, also where all are 4."""
    model = Limited((0, 0, 4))
    inputs = (torch.randn(batch, 4, 4), torch.ones(batch, 4)), {}
    tried: list[tuple[int, ...]] = []

    def run(inputs: Inputs) -> Any:
        try:
            copy.deepcopy(model)(*inputs[0])
        except (ValueError, RuntimeError):
            return None
        tried.append(tuple(inputs[0][0].shape))
        return trace(model, inputs, "fake")

    assert list(at_other_sizes(inputs, run))
    assert any(shape[0] != batch for shape in tried)
    assert any(shape[1] < 4 for shape in tried)
    assert all(shape[2] == 4 for shape in tried)


def test_a_forward_without_a_module() -> None:
    """As ``exec`` makes it."""
    scope: dict[str, Any] = {}
    exec("def forward(self, x): return self.head(self.first(x).relu() * x.shape[1])", scope)
    scope["forward"].__module__ = None
    model = type("Made", (Layers,), {"forward": scope["forward"]})(abs).double().eval()
    check(model, {"first.weight": half(model)["first.weight"]}, (2, 6, 6), (3, 4, 6))
