"""Budgets: prune until the forecast fits, no further, and what it forecasts is what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from maskprop import ModelSpeedup
from maskprop.errors import GroupError, MaskpropError, OptionError, RatioError
from maskprop.pruning import AGPPruner, Budget, L1NormPruner, LevelPruner, measure

X = torch.zeros(1, 3, 8, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 40, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("budget", [Budget(parameters=0.3), Budget(flops=0.3), Budget(parameters=4000, flops=0.9)])
def test_ends_just_below_the_budget(budget: Budget, ranking: str) -> None:
    model = network()
    dense = measure(model, ((X,), {}))
    pruner = L1NormPruner(model, 0.5, dummy_input=X, budget=budget, ranking=ranking)
    removal = pruner.prune()
    ModelSpeedup(model, X, removal.masks).speedup_model()
    left, allowed = measure(model, ((X,), {})), budget.allowed(dense)
    assert left == removal.forecast
    assert left.parameters <= allowed.parameters
    assert left.flops <= allowed.flops
    unit = max((group.cost for group in pruner.groups), key=lambda cost: cost.parameters)
    tight = left.parameters > allowed.parameters - 2 * unit.parameters or left.flops > allowed.flops - 2 * unit.flops
    assert tight, (left, allowed)


def test_ratios_say_how_much_one_group_is_pruned_beside_another() -> None:
    config = {"0": 0.1, "3": 0.4}
    kept = L1NormPruner(network(), config, dummy_input=X, budget=Budget(parameters=0.5)).prune().kept
    gone = 1 - kept["0"] / 24, 1 - kept["3"] / 40
    assert gone[1] == pytest.approx(4 * gone[0], abs=4 / 24)


def test_a_schedule_goes_to_the_budget() -> None:
    model = network()
    pruner = L1NormPruner(model, 0.5, dummy_input=X, budget=Budget(flops=0.4))
    schedule, left = AGPPruner(pruner, total_times=3), []
    while not schedule.done:
        schedule.step()
        assert pruner.removal is not None
        assert pruner.removal.forecast is not None
        left.append(pruner.removal.forecast.flops / measure(network(), ((X,), {})).flops)
    assert left[0] > left[1] > left[2]
    assert 0.3 < left[2] <= 0.4


@pytest.mark.parametrize(
    ("budget", "options", "error", "message"),
    [
        ({"parameters": 1.5}, {}, RatioError, r"parameters is 1.5: what is left must be a float in \(0, 1\]"),
        ({"flops": 0}, {}, RatioError, "flops is 0: what is left"),
        ({"parameters": 10}, {"dummy_input": X}, RatioError, "the budget of 10 parameters and .* is out of reach"),
        ({"parameters": 0.5}, {}, GroupError, "found without a dummy input"),
    ],
)
def test_errors(budget: dict[str, Any], options: dict[str, Any], error: type[MaskpropError], message: str) -> None:
    with pytest.raises(error, match=message):
        L1NormPruner(network(), 0.5, budget=Budget(**budget), **options).prune()
    with pytest.raises(OptionError, match="LevelPruner prunes single weights"):
        LevelPruner(network(), 0.5, budget=Budget(flops=0.5))
