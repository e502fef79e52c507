"""Compact models that do exactly what the plan expects are followed through the dense graph, and not traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo.handmade import HANDMADE
from benchmarks.zoo.maskings import make_masks
from benchmarks.zoo.randomise import randomise
from maskprop import ModelSpeedup
from maskprop.rewrite import replay
from maskprop.rewrite.replay import Mismatch, Replay

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
