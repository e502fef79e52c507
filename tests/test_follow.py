"""Compact models that do exactly what the plan expects are followed through the dense graph, and not traced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from benchmarks.zoo.handmade import HANDMADE
from benchmarks.zoo.maskings import make_masks
from benchmarks.zoo.randomise import randomise
from maskprop import ModelSpeedup
from maskprop.rewrite import replay
from maskprop.rewrite.mismatch import Mismatch
from maskprop.rewrite.replay import Replay

CASES = [
    ("res_net", "constants"), ("inverted_residual", "zeros"), ("dense_net", "conflicts"), ("gpt2", "heads_out"),
    ("llama", "heads"), ("vi_t", "dims"), ("swin", "heads"), ("hard_number", "zeros"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "masking"), CASES)
def test_what_is_followed_agrees_as_a_whole_too(name: str, masking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[bool] = []

    def both(self: Replay, model: nn.Module, inputs: replay.Inputs) -> Mismatch | None:
        mismatch = self.compare(*replay.trace_partial(model, inputs, self.concrete, self.training))
        outcomes.append(self.follows(model, inputs))
        assert not (outcomes[-1] and mismatch is not None), mismatch
        return mismatch

    specimen = HANDMADE[name]
    torch.manual_seed(0)
    model = randomise(specimen.build().eval(), specimen.inputs())
    masks = make_masks(model, specimen.inputs(), [masking])[masking]
    monkeypatch.setattr(Replay, "run", both)
    ModelSpeedup(model, specimen.inputs(), masks).speedup_model()
    assert outcomes


class Heads(nn.Module):
    """Two units a head."""

    def __init__(self, heads: int, factor: float) -> None:
        super().__init__()
        self.into, self.out, self.heads, self.factor = nn.Linear(6, 8), nn.Linear(8, 4), heads, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.into(x).view(len(x), self.heads, 2) * self.factor
        return self.out(y.relu().flatten(1) * torch.tensor(self.factor))


CHANGES = [({}, True), ({"heads": 4}, False), ({"factor": 3.0}, False), ({"wider": 1}, False)]


@pytest.mark.parametrize(("change", "same"), CHANGES)
def test_a_model_that_goes_another_way_is_not_followed(
    change: dict[str, Any], same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def follows(self: Replay, model: nn.Module, inputs: replay.Inputs) -> bool:
        right, weight = (model.heads, model.factor), model.out.weight.data
        model.out.weight.data = torch.ones(4, weight.shape[1] + change.get("wider", 0))
        model.heads, model.factor = change.get("heads", right[0]), change.get("factor", right[1])
        found.append(whole(self, model, inputs))
        model.heads, model.factor = right
        model.out.weight.data = weight
        return found[-1]

    whole = Replay.follows
    monkeypatch.setattr(Replay, "follows", follows)
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    model = Heads(4, 2.0).eval()
    ModelSpeedup(model, torch.randn(2, 6), {"into": {"weight": mask[:, None], "bias": mask}}).speedup_model()
    assert (model.heads, model.into.out_features) == (2, 4)
    assert found[-1] == same


class Block(Heads):
    """One of several that are alike, but for their numbers."""

    ran: ClassVar[list[int]] = []

    def __init__(self, number: int) -> None:
        super().__init__(4, 2.0)
        self.number, self.back, self.kept = number, nn.Linear(4, 6), nn.ReLU()

    def forward(self, x: torch.Tensor, scales: list[float]) -> torch.Tensor:  # type: ignore[override]
        Block.ran.append(self.number)
        y = self.into(x).view(len(x), self.heads, 2) * scales[0] * self.factor
        y = ((y * 2 + 1).tanh() - 0.5).sigmoid()  # so that following takes longer than comparing
        return x + self.back(self.out(self.kept(y).flatten(1)))


class Blocks(nn.Module):
    """Three of them."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, numbers))
        self.scales = [[2.0]] * 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, scales in zip(self.blocks, self.scales, strict=True):
            x = block(x, scales)
        return x


def _stale(model: Any, which: int) -> None:
    model.blocks[which].heads = 4


def _other_factor(model: Any, which: int) -> None:
    model.blocks[which].factor = 3.0


def _other_argument(model: Any, which: int) -> None:
    model.scales[which] = [3.0]


def _wider(model: Any, which: int) -> None:
    model.blocks[which].out.weight.data = torch.ones(4, 5)


def _hooked(model: Any, which: int) -> None:
    model.blocks[which].out.register_forward_hook(lambda module, args, result: result * 2.0)


def _other_class(model: Any, which: int) -> None:
    model.blocks[which].kept.__class__ = nn.Tanh


TAMPERED = [_stale, _other_factor, _other_argument, _wider, _hooked, _other_class]


@pytest.mark.parametrize("numbers", [[0, 1, 7], [0, 1, 4], [0, 1, 2]], ids=str)
def test_of_like_blocks_one_is_followed(numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[bool, list[int]]] = []

    def follows(self: Replay, model: nn.Module, inputs: replay.Inputs) -> bool:
        Block.ran.clear()
        ran.append((whole(self, model, inputs), [*Block.ran]))
        return ran[-1][0]

    whole = Replay.follows
    monkeypatch.setattr(Replay, "follows", follows)
    _halve_heads(numbers)
    # a number that is a size as well, and was not set, might be one that should have been
    assert ran[-1] == (True, [0, *(n for n in numbers if n in (2, 4))])


@pytest.mark.parametrize("tamper", TAMPERED)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_block_that_is_unlike_the_others_is_seen(
    tamper: Callable[[Any, int], None], which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def follows(self: Replay, model: nn.Module, inputs: replay.Inputs) -> bool:
        if not whole(self, model, inputs):
            return False
        tampered = copy.deepcopy(model)
        tamper(tampered, which)
        found.append(whole(self, tampered, inputs))
        return True

    whole = Replay.follows
    monkeypatch.setattr(Replay, "follows", follows)
    _halve_heads([0, 1, 7])
    assert found
    assert not any(found)


def _halve_heads(numbers: list[int]) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    model = Blocks(numbers).eval()
    masks = {f"blocks.{i}.into": {"weight": mask[:, None], "bias": mask} for i in range(len(numbers))}
    ModelSpeedup(model, torch.randn(2, 6), masks).speedup_model()
    assert [(block.heads, block.into.out_features) for block in model.blocks] == [(2, 4)] * 3
