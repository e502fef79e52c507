"""Attributes that name a size follow it, read by ``forward`` or not; those that mean something else do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskprop import ModelSpeedup


class Attention(nn.Module):
    """Reads ``head_dim`` alone; says how many heads there are, and how wide they are together, for others to read."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner = heads, head_dim, heads * head_dim
        self.width, self.gain = width, heads  # another size that stays, and a number that only equals one
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim) for _ in range(3))
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = self.gain * q @ k.transpose(-1, -2) / self.head_dim**0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Sizes that no forward reads."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.in_features, self.hidden_features, self.rate = width, hidden, 0.5
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


def prune(model: nn.Module, width: int, masks: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, width)
    ModelSpeedup(model.eval(), x, masks).speedup_model()


def test_sizes_that_forward_does_not_read_follow() -> None:
    model = Mlp(10, 12)
    prune(model, 10, {"fc2.weight": (torch.arange(12) >= 5).float()[None]})
    assert model.fc1.out_features == model.hidden_features == 7
    assert (model.in_features, model.rate) == (10, 0.5)


class Numbered(Mlp):
    """Which of several it is, and how long a sequence may be: later calls, of a cache say, would read both."""

    def __init__(self, width: int, hidden: int, number: int) -> None:
        super().__init__(width, hidden)
        self.number, self.max_positions = number, hidden


def test_numbers_of_layers_and_positions_stay() -> None:
    """Also where they are as large as a size that changes."""
    model = nn.Sequential(*(Numbered(10, 6, number) for number in range(4, 9)))
    masks = {f"{i}.fc2.weight": (torch.arange(6) >= 2).float()[None] for i in range(5)}
    prune(model, 10, masks)
    assert [layer.hidden_features for layer in model] == [4] * 5
    assert [layer.number for layer in model] == [4, 5, 6, 7, 8]
    assert [layer.max_positions for layer in model] == [6] * 5


def test_numbers_that_forward_reads_as_something_else_stay() -> None:
    model = Attention(width=20, heads=4, head_dim=6)
    prune(model, 20, {"proj.weight": (torch.arange(24) >= 12).float()[None]})
    assert model.proj.in_features == model.inner == 12
    assert (model.num_heads, model.gain, model.width, model.head_dim) == (2, 4, 20, 6)


class Grouped(nn.Module):
    """Query heads of a group and their key and value in one axis, which is as long as there are query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.groups = 4, 2
        self.qkv, self.proj = nn.Linear(12, 64), nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(len(x), -1, self.groups, self.num_heads // self.groups + 2, 8)
        q, k, v = parts[..., :-2, :], parts[..., [-2], :], parts[..., [-1], :]
        q, k, v = (t.expand_as(q).flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        scores = q.reshape(len(x), self.num_heads, -1, 8) @ k.transpose(-1, -2)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_of_two_sizes_that_an_attribute_may_hold_that_one_is_set_which_fits_everywhere() -> None:
    model = Grouped()
    columns = (torch.arange(32) // 8 % 2).float()[None]  # the first query head of each group
    torch.manual_seed(0)
    speedup = ModelSpeedup(model.eval(), torch.randn(3, 5, 12), {"proj.weight": columns})
    speedup.speedup_model()
    assert (model.qkv.out_features, model.proj.in_features) == (48, 16)
    assert (model.num_heads, model.groups, speedup.report.repair.generated) == (2, 2, {})


def test_a_value_that_means_two_sizes_stays() -> None:
    model = Mlp(12, 12)
    prune(model, 12, {"fc2.weight": (torch.arange(12) >= 5).float()[None]})
    assert model.fc1.out_features == 7
    assert (model.in_features, model.hidden_features) == (12, 12)
