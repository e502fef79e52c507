"""Small nasty models: what is pruned of each, and the shapes that must remain, worked out by hand."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.check import masked_reference
from benchmarks.zoo.randomise import randomise

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


class Projections(nn.Module):
    """What attention over a width of 12 is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 12)
        self.k = nn.Linear(12, 12)
        self.v = nn.Linear(12, 12)
        self.o = nn.Linear(12, 12)


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


class Subject:
    """A case's model, randomised, its masks and the masked model.

    Args:
        name: of the case.
        more: what else is pruned.
    """

    def __init__(self, name: str, more: dict[str, Index] | None = None) -> None:
        self.case = CASES[name]
        torch.manual_seed(0)
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.model = self.case.model().eval()
        if self.case.rand:
            randomise(self.model, self.inputs(2))
        self.case.prep(self.model)
        self.masks = self.masks_of(self.case.pruned)
        self.masked = masked_reference(self.model, self.masks | self.masks_of(more or {})).eval()

    def inputs(self, batch: int | None = None) -> Any:
        """Fresh ones; by default of the dummy input's batch size."""
        return self.case.inputs(self.case.batches[0] if batch is None else batch, self.generator)

    def masks_of(self, pruned: dict[str, Index]) -> dict[str, Tensor]:
        """Zeros at these indices of the parameters."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        masks = {key: torch.ones(parameters[key].shape) for key in pruned}
        for key, index in pruned.items():
            masks[key][index] = 0
        return masks
