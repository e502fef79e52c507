"""Zeros leave an RMS norm: eps and the weight make up for the number of units that the mean is over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo.check import count_parameters, masked_reference
from benchmarks.zoo.randomise import randomise
from maskprop import ModelSpeedup
from tests.small import error

ROWS = torch.ones(16)
ROWS[[0, 3, 4, 5, 9, 15]] = 0


class Written(nn.Module):
    """An RMS norm by hand, eps in an attribute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 0.3

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon)).to(x.dtype)


class Literal(Written):
    """Eps in forward."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + 0.25).sqrt() * self.weight


class OnePlus(Written):
    """The weight is a difference from one."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return y * (1.0 + self.weight.float())


class Grouped(Written):
    """A mean for each of two groups, and one weight for them all."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.size = width // 2

    def forward(self, x: Tensor) -> Tensor:
        groups = x.view(*x.shape[:-1], x.shape[-1] // self.size, self.size)
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * groups.view(x.shape)


class Bare(Written):
    """No weight of its own in the product."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 16), norm, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(torch.relu(self.fc1(x))))


class Twice(Net):
    """Both calls would need the factor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.norm(torch.relu(self.fc1(x)))))


class Stream(nn.Module):
    """A residual stream between norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norms = nn.ModuleList(nn.RMSNorm(16, eps=0.1) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(16, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, 16) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(self.norms[2](x))


class Heads(nn.Module):
    """Four heads of four dims, each normalised with the weights of all."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)
        self.norm_q, self.norm_k = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(0, 1) for f in (self.q, self.k, self.v))
        y = (self.norm_q(q) @ self.norm_k(k).transpose(1, 2)).softmax(-1) @ v
        return self.o(y.transpose(0, 1).flatten(1))


def compacted(
    model: nn.Module,
    names: tuple[str, ...] = ("fc1.weight", "fc1.bias"),
    tolerance: float = 1e-5,
    rows: Tensor = ROWS,
) -> nn.Module:
    model = randomise(model.eval(), (torch.randn(4, 6, dtype=next(model.parameters()).dtype),))
    masks = {}
    for name in names:
        shape = model.get_parameter(name).shape
        masks[name] = rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    reference = masked_reference(model, masks)
    dtype = model.get_parameter(names[0]).dtype
    ModelSpeedup(model, torch.randn(2, 6, dtype=dtype), masks).speedup_model()
    for batch in (1, 5):
        assert error(model, reference, torch.randn(batch, 6, dtype=dtype)) <= tolerance
    return model


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.RMSNorm(16, eps=0.2),
        lambda: nn.RMSNorm(16),
        lambda: Written(16),
        lambda: Literal(16),
        lambda: OnePlus(16),
    ],
    ids=["nn", "nn without eps", "attribute", "literal", "one plus weight"],
)
def test_zeros_leave(norm: Callable[[], nn.Module]) -> None:
    model = compacted(Net(norm()))
    assert model.fc1.out_features == model.fc2.in_features == 10
    assert model.norm.weight.shape == (10,)


@pytest.mark.parametrize("norm", [lambda: nn.RMSNorm(4, eps=0.2), lambda: Written(4)], ids=["nn", "written"])
def test_dims_of_heads_leave(norm: Callable[[], nn.Module]) -> None:
    """A dim that is zero in every head; the first of the fourth head is zero in that one only."""
    rows = torch.tensor([1.0, 0, 1, 1] * 4)
    rows[12] = 0
    model = randomise(Heads(norm).eval(), (torch.randn(4, 6),))
    masks = {name: rows.reshape(-1, *[1] * name.count("w")) for name in ("q.weight", "q.bias", "k.weight", "k.bias")}
    reference = masked_reference(model, masks)
    ModelSpeedup(model, torch.randn(5, 6), masks).speedup_model()
    assert model.q.out_features == model.k.out_features == 12
    assert model.norm_q.weight.shape == model.norm_k.weight.shape == (3,)
    assert error(model, reference, torch.randn(7, 6)) <= 1e-5


def test_each_group_gives_as_many_units() -> None:
    """Of the first group four units are zero, of the second one two others; a group that is all zero leaves whole."""
    model = compacted(Net(Grouped(16)))
    assert model.fc1.out_features == len(model.norm.weight) == 12
    assert model.norm.variance_epsilon == pytest.approx(0.3 * 8 / 6)
    model = compacted(Net(Grouped(16)), rows=(torch.arange(16) < 8).float())
    assert model.fc1.out_features == len(model.norm.weight) == 8
    assert model.norm.variance_epsilon == 0.3


def test_eps_follows_the_mean() -> None:
    model = compacted(Net(nn.RMSNorm(16, eps=0.2)).double(), tolerance=1e-12)
    assert model.norm.eps == pytest.approx(0.2 * 16 / 10, rel=1e-12)
    assert model.norm.normalized_shape == (10,)


def test_a_residual_stream() -> None:
    names = ("embed.weight", "embed.bias", *(f"down.{i}.{k}" for i in range(2) for k in ("weight", "bias")))
    model = compacted(Stream(), names)
    assert model.head.in_features == 10
    assert [n.eps for n in model.norms] == pytest.approx([0.16] * 3)
    again = count_parameters(model)
    ModelSpeedup(model, torch.randn(2, 6), {n: torch.ones_like(p) for n, p in model.named_parameters()}).speedup_model()
    assert count_parameters(model) == again


@pytest.mark.parametrize(
    "model",
    [lambda: Net(Bare(16)), lambda: Twice(Written(16)), lambda: Net(nn.RMSNorm(16, elementwise_affine=False))],
    ids=["no weight", "two calls", "not affine"],
)
def test_what_has_no_place_for_the_factor_stays(model: Callable[[], nn.Module]) -> None:
    assert compacted(model()).fc1.out_features == 16


def test_constants_stay() -> None:
    """A unit that is constant counts in the mean, unless the activation makes it zero."""
    norm = nn.RMSNorm(16)
    norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert compacted(Net(norm), ("fc1.weight", "fc1.bias")).fc2.in_features == 16
