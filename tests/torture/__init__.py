"""Small nasty models: what is pruned of each, and the shapes that must remain, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Index = tuple[slice | int | list[int], ...]
Shapes = dict[str, tuple[int, ...]]
Inputs = Callable[[int, torch.Generator], Any]
ALL = slice(None)


@dataclass(frozen=True)
class Case:
    """A model and its masks.

    Attributes:
        model: makes it.
        inputs: for a batch size.
        pruned: what the masks take of each parameter.
        left: shapes of the parameters that shrink; all others stay as they are.
        batches: sizes at which it is compared; the first is the dummy input's.
        tol: the relative L2 error that rounding explains.
        prep: called with the randomised model.
        rand: whether the model stands randomising.
        tracer: see :class:`maskprop.ModelSpeedup`.
    """

    model: Callable[[], nn.Module]
    inputs: Inputs
    pruned: dict[str, Index]
    left: Shapes
    batches: tuple[int, ...] = (2, 1, 3)
    tol: float = 1e-5
    prep: Callable[[nn.Module], Any] = field(default=lambda model: None)
    rand: bool = True
    tracer: str = "auto"


CASES: dict[str, Case] = {}


def case(inputs: Inputs, pruned: dict[str, Index], left: Shapes, **options: Any) -> Callable[[type], type]:
    """Class decorator: a model that is a case of its own."""

    def add(model: type) -> type:
        CASES[model.__name__] = Case(model, inputs, pruned, left, **options)
        return model

    return add


def images(channels: int = 3, size: int = 8) -> Inputs:
    return lambda n, g: torch.randn(n, channels, size, size, generator=g)


def vectors(*shape: int) -> Inputs:
    return lambda n, g: torch.randn(n, *shape, generator=g)


def tokens(count: int, length: int) -> Inputs:
    return lambda n, g: torch.randint(0, count, (n, length), generator=g)
