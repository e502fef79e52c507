"""Measures are those worked out by hand, and leave the model alone."""

from __future__ import annotations

import torch
from torch import nn

from maskprop import measure


def test_linear_by_hand() -> None:
    model = nn.Linear(3, 4)
    assert measure.count_parameters(model) == 3 * 4 + 4
    assert measure.count_flops(model, torch.zeros(5, 3)) == 5 * 2 * 3 * 4


def test_convolution_by_hand() -> None:
    model = nn.Conv2d(2, 6, 3, padding=1, groups=2, bias=False)
    assert measure.count_parameters(model) == 6 * 1 * 9
    assert measure.count_flops(model, torch.zeros(1, 2, 8, 8)) == 2 * 8 * 8 * 6 * 9


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    assert measure.count_parameters(model) == 40


def test_file_size_grows_with_the_weights() -> None:
    small, large = measure.file_size(nn.Linear(10, 10)), measure.file_size(nn.Linear(100, 100))
    assert large - small >= 4 * (100 * 100 - 10 * 10)


def test_latencies_order_models_by_their_work() -> None:
    models = {"small": nn.Linear(8, 8), "large": nn.Linear(2048, 2048)}
    models["small"] = nn.Sequential(models["small"], nn.Linear(8, 2048))
    x = {"small": torch.zeros(64, 8), "large": torch.zeros(64, 2048)}
    times = {name: measure.latencies({name: models[name]}, x[name], rounds=3, seconds=0.02)[name] for name in x}
    assert 0 < times["small"] < times["large"]


def test_modes_are_restored() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    model[1].eval()
    mean = model[0].running_mean.clone()
    measure.count_flops(model, torch.randn(4, 3))
    measure.latencies({"model": model}, torch.randn(4, 3), rounds=1, seconds=0.001)
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert torch.equal(model[0].running_mean, mean)
