"""Small models of each kind, their masks, and what a speedup makes of them: for the tests of the result."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.check import masked_reference, relative_error
from benchmarks.zoo.handmade import HANDMADE
from benchmarks.zoo.maskings import make_masks
from benchmarks.zoo.randomise import randomise
from benchmarks.zoo.specimen import Inputs, call
from maskprop import ModelSpeedup

# Test name -> specimen, and the maskings that are combined. The last one holds a size in its forward.
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cnn": ("res_net", ("constants",)),
    "vit": ("vi_t", ("heads", "mlp")),
    "bert": ("bert", ("heads", "mlp")),
    "llama": ("llama", ("heads", "mlp_out")),
    "generated": ("hard_number", ("zeros",)),
}
TOLERANCE = 1e-5


@lru_cache
def _dense(name: str) -> nn.Module:
    specimen = HANDMADE[MODELS[name][0]]
    torch.manual_seed(0)
    return randomise(specimen.build().eval(), specimen.inputs())


def dense(name: str) -> nn.Module:
    """A model of its own, randomised."""
    return copy.deepcopy(_dense(name))


@lru_cache
def _masks(name: str) -> dict[str, Tensor]:
    specimen, maskings = MODELS[name]
    merged: dict[str, Tensor] = {}
    for masks in make_masks(_dense(name), HANDMADE[specimen].inputs(), list(maskings)).values():
        for parameter, mask in masks.items():
            merged[parameter] = merged[parameter] * mask if parameter in merged else mask
    return merged


def masks(name: str) -> dict[str, Tensor]:
    """Masks under which every kind of its axes shrinks."""
    return {parameter: mask.clone() for parameter, mask in _masks(name).items()}


def inputs(name: str, batch: int = 2, seed: int = 0, stretch: int = 0) -> Inputs:
    """Inputs of the model."""
    return HANDMADE[MODELS[name][0]].inputs(batch, seed, stretch)


def cast(value: Inputs, **options: Any) -> Inputs:
    """Floating inputs in another dtype or memory format."""
    return value.to(**options) if isinstance(value, Tensor) and value.is_floating_point() else value


def sped_up(name: str, **options: Any) -> ModelSpeedup:
    """The model's speedup, done."""
    speedup = ModelSpeedup(dense(name), inputs(name), masks(name), **options)
    speedup.speedup_model()
    return speedup


@lru_cache
def _compact(name: str) -> nn.Module:
    return sped_up(name).model


def compact(name: str) -> nn.Module:
    """The compact model, one of its own."""
    return copy.deepcopy(_compact(name))


def masked(name: str) -> nn.Module:
    """The masked model at full size."""
    return masked_reference(_dense(name), _masks(name))


@torch.no_grad()
def error(actual: nn.Module, expected: nn.Module, value: Inputs) -> float:
    """Relative L2 distance of the outputs of two models."""
    return relative_error(call(actual, value), call(expected, value))
