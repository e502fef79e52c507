"""Every kind of layer comes out as if it had been made small: its printed settings, its tensors, what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo.check import masked_reference
from benchmarks.zoo.randomise import randomise
from maskprop import ModelSpeedup
from tests.small import TOLERANCE, error

Index = tuple[slice | list[int], ...]
ALL = slice(None)
CONVS: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TURNED: list[Any] = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


@dataclass(frozen=True)
class Leaf:
    """A layer between two others, and the layer that it must become.

    Attributes:
        dense, small: make it.
        before, after: sizes of what it reads and gives.
        lost: units that it does not get any more.
        pruned: of its own parameters.
        space: axes behind the channels; ``None`` for vectors.
        tokens: whether what it reads are token ids.
    """

    dense: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    before: int
    after: int
    lost: tuple[int, ...] = ()
    pruned: dict[str, Index] = field(default_factory=dict)
    space: tuple[int, ...] = ()
    tokens: bool = False


class First(nn.Module):
    """The first result of a recurrent layer; a pair of inputs for a bilinear one."""

    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.leaf = leaf

    def forward(self, x: Tensor) -> Tensor:
        given = (x, x[..., :5]) if isinstance(self.leaf, nn.Bilinear) else (x,)
        result = self.leaf(*given)
        return result[0] if isinstance(result, tuple) else result


def between(case: Leaf) -> nn.Module:
    if case.tokens:
        return nn.Sequential(First(case.dense()), nn.Linear(case.after, 2))
    if case.space:
        kind = CONVS[len(case.space) - 1]
        return nn.Sequential(kind(3, case.before, 1), First(case.dense()), kind(case.after, 2, 1))
    return nn.Sequential(nn.Linear(3, case.before), First(case.dense()), nn.Linear(case.after, 2))


def inputs(case: Leaf, batch: int) -> Tensor:
    if case.tokens:
        return torch.randint(20, (batch, 4))
    return torch.randn(batch, 3, *case.space) if case.space else torch.randn(batch, 3)


def gates(count: int, hidden: int, lost: list[int]) -> Index:
    """Rows of the same units in each gate."""
    return ([gate * hidden + unit for gate in range(count) for unit in lost],)


def recurrent(count: int, lost: list[int], *suffixes: str) -> dict[str, Index]:
    """All that makes these hidden units: what comes in, what comes back, biases."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {kind + suffix: gates(count, 8, lost) for kind in kinds for suffix in suffixes}


def affine(lost: list[int]) -> dict[str, Index]:
    return {"weight": (lost,), "bias": (lost,)}


def spaces(kinds: list[Any]) -> list[tuple[Any, tuple[int, ...]]]:
    return [(kind, (5,) * (i + 1)) for i, kind in enumerate(kinds)]


LEAVES: dict[str, Leaf] = {
    "Linear": Leaf(lambda: nn.Linear(8, 6), lambda: nn.Linear(6, 4), 8, 6, (0, 5), affine([1, 2])),
    "Linear, no bias": Leaf(
        lambda: nn.Linear(8, 6, bias=False), lambda: nn.Linear(6, 4, bias=False), 8, 6, (0, 5), {"weight": ([1, 2],)}
    ),
    "Bilinear": Leaf(lambda: nn.Bilinear(8, 5, 6), lambda: nn.Bilinear(6, 5, 4), 8, 6, (6, 7), affine([1, 2])),
    "PReLU": Leaf(lambda: nn.PReLU(8), lambda: nn.PReLU(6), 8, 8, (0, 5)),
    "RMSNorm": Leaf(lambda: nn.RMSNorm(8, 1e-3), lambda: nn.RMSNorm(6, 1e-3 * 8 / 6), 8, 8, (0, 5)),
    "Embedding": Leaf(
        lambda: nn.Embedding(20, 8), lambda: nn.Embedding(20, 6), 8, 8, (), {"weight": (ALL, [0, 5])}, tokens=True
    ),
    "EmbeddingBag": Leaf(
        lambda: nn.EmbeddingBag(20, 8), lambda: nn.EmbeddingBag(20, 6), 8, 8, (), {"weight": (ALL, [0, 5])}, tokens=True
    ),
    "Unflatten": Leaf(
        lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Flatten(1)),
        lambda: nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Flatten(1)),
        *(8, 8, (2, 3)),
    ),
    "ChannelShuffle": Leaf(lambda: nn.ChannelShuffle(2), lambda: nn.ChannelShuffle(2), 8, 8, (0, 4), space=(5, 5)),
    "PixelShuffle": Leaf(lambda: nn.PixelShuffle(2), lambda: nn.PixelShuffle(2), 8, 2, (0, 1, 2, 3), space=(5, 5)),
    "LSTM": Leaf(lambda: nn.LSTM(5, 8), lambda: nn.LSTM(4, 6), 5, 8, (0,), recurrent(4, [0, 5], "_l0")),
    "LSTM of two layers": Leaf(
        lambda: nn.LSTM(5, 8, 2), lambda: nn.LSTM(4, 6, 2), 5, 8, (0,), recurrent(4, [0, 5], "_l0", "_l1")
    ),
    "GRU": Leaf(lambda: nn.GRU(5, 8), lambda: nn.GRU(4, 6), 5, 8, (0,), recurrent(3, [0, 5], "_l0")),
    "GRU both ways": Leaf(
        lambda: nn.GRU(5, 8, bidirectional=True),
        lambda: nn.GRU(4, 6, bidirectional=True),
        *(5, 16, (0,), recurrent(3, [0, 5], "_l0", "_l0_reverse")),
    ),
    "RNN": Leaf(lambda: nn.RNN(5, 8), lambda: nn.RNN(4, 6), 5, 8, (0,), recurrent(1, [0, 5], "_l0")),
    "LSTMCell": Leaf(lambda: nn.LSTMCell(5, 8), lambda: nn.LSTMCell(4, 6), 5, 8, (0,), recurrent(4, [0, 5], "")),
    "GRUCell": Leaf(lambda: nn.GRUCell(5, 8), lambda: nn.GRUCell(4, 6), 5, 8, (0,), recurrent(3, [0, 5], "")),
    "RNNCell": Leaf(lambda: nn.RNNCell(5, 8), lambda: nn.RNNCell(4, 6), 5, 8, (0,), recurrent(1, [0, 5], "")),
}
for kind, space in spaces(CONVS):
    name = kind.__name__
    LEAVES |= {
        name: Leaf(
            lambda k=kind: k(8, 6, 3, padding=1),
            lambda k=kind: k(6, 4, 3, padding=1),
            *(8, 6, (0, 5), affine([1, 2]), space),
        ),
        f"{name} in groups": Leaf(
            lambda k=kind: k(8, 6, 3, groups=2),
            lambda k=kind: k(6, 4, 3, groups=2),
            *(8, 6, (0, 5), affine([1, 3]), space),
        ),
        f"{name} that loses a group": Leaf(
            lambda k=kind: k(8, 6, 3, groups=2),
            lambda k=kind: k(4, 3, 3, groups=1),
            *(8, 6, (0, 1, 2, 3), affine([0, 1, 2]), space),
        ),
        f"{name} by depth": Leaf(
            lambda k=kind: k(8, 16, 3, groups=8),
            lambda k=kind: k(6, 12, 3, groups=6),
            *(8, 16, (0, 5), affine([0, 1, 10, 11]), space),
        ),
    }
for kind, space in spaces(TURNED):
    name = kind.__name__
    LEAVES |= {
        name: Leaf(
            lambda k=kind: k(8, 6, 3, stride=2),
            lambda k=kind: k(6, 4, 3, stride=2),
            *(8, 6, (0, 5), {"weight": (ALL, [1, 2]), "bias": ([1, 2],)}, space),
        ),
        f"{name} in groups": Leaf(
            lambda k=kind: k(8, 6, 3, groups=2),
            lambda k=kind: k(6, 4, 3, groups=2),
            *(8, 6, (0, 5), {"weight": (ALL, [1]), "bias": ([1, 4],)}, space),
        ),
    }
NORMS: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    *((kind, space, {}) for kind, space in spaces([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])),
    (nn.BatchNorm2d, (5, 5), {"affine": False}),
    (nn.BatchNorm2d, (5, 5), {"track_running_stats": False}),
    (nn.SyncBatchNorm, (5, 5), {}),
    *((kind, space, {}) for kind, space in spaces([nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d])),
    (nn.InstanceNorm2d, (5, 5), {"affine": True}),
    (nn.InstanceNorm2d, (5, 5), {"affine": True, "track_running_stats": True}),
]
for kind, space, options in NORMS:
    with_affine = options.get("affine", not issubclass(kind, nn.modules.instancenorm._InstanceNorm))
    LEAVES[f"{kind.__name__} {options or ''}"] = Leaf(
        lambda k=kind, o=options: k(8, **o),
        lambda k=kind, o=options: k(6, **o),
        *(8, 8, (0, 5), affine([0, 5]) if with_affine else {}, space),
    )
for with_affine in (True, False):
    LEAVES[f"GroupNorm affine={with_affine}"] = Leaf(
        lambda a=with_affine: nn.GroupNorm(4, 8, affine=a),
        lambda a=with_affine: nn.GroupNorm(2, 4, affine=a),
        *(8, 8, (0, 1, 4, 5), affine([0, 1, 4, 5]) if with_affine else {}, (5, 5)),
    )


@pytest.mark.parametrize("name", LEAVES)
def test_it_is_as_if_made_small(name: str) -> None:
    case = LEAVES[name]
    model = between(case).eval()
    randomise(model, (inputs(case, 2),))
    at = 0 if case.tokens else 1
    pruned = {f"{at}.leaf.{key}": index for key, index in case.pruned.items()}
    pruned |= {f"0.{key}": ([*case.lost],) for key in ("weight", "bias") if case.lost}
    masks = {key: torch.ones_like(model.get_parameter(key)) for key in pruned}
    for key, index in pruned.items():
        masks[key][index] = 0
    masked = masked_reference(model, masks)
    names = list(model.state_dict())
    ModelSpeedup(model, inputs(case, 2), masks).speedup_model()
    leaf, small = model[at].leaf, case.small()
    assert repr(leaf) == repr(small)
    shapes = {key: value.shape for key, value in leaf.state_dict().items()}
    assert shapes == {key: value.shape for key, value in small.state_dict().items()}
    assert list(model.state_dict()) == names
    assert type(leaf) is type(small)
    for batch in (2, 1, 3):
        assert error(model, masked, inputs(case, batch)) <= TOLERANCE
    if small.state_dict():  # it can be loaded into a small layer, and saved ones of that into it
        leaf.load_state_dict(small.state_dict())
