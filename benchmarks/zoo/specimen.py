"""What a zoo holds: a name, a way to build the model and a way to make inputs for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

#: A model's inputs, in the form of ``ModelSpeedup``'s ``dummy_input``.
Inputs = torch.Tensor | tuple[Any, ...] | dict[str, Any]
#: ``(batch, stretch, generator) -> inputs``; ``stretch`` lengthens the sequences where a model has any.
InputMaker = Callable[[int, int, torch.Generator], Inputs]


@dataclass(frozen=True)
class Specimen:
    """One model of a zoo.

    Attributes:
        name: unique within its zoo.
        build: makes the model, with whatever weights; see :func:`zoo.randomise.randomise`.
        make: makes inputs, see :data:`InputMaker`.
        stretches: whether the sequence length is free.
        generates: whether ``model.generate`` must work on the result.
        batch: the batch size of the dummy input.
        fresh: the batch sizes that the result is checked on.
    """

    name: str
    build: Callable[[], nn.Module]
    make: InputMaker = field(repr=False)
    stretches: bool = False
    generates: bool = False
    batch: int = 2
    fresh: tuple[int, ...] = (1, 3)

    def inputs(self, batch: int | None = None, seed: int = 0, stretch: int = 0) -> Inputs:
        """Inputs of the given batch size (the dummy input's by default), different for every seed."""
        generator = torch.Generator().manual_seed(seed)
        return self.make(self.batch if batch is None else batch, stretch, generator)

    def fresh_inputs(self) -> list[Inputs]:
        """Inputs that no stage of a speedup has seen: other values, other batch sizes, other lengths."""
        fresh = [self.inputs(batch, seed=100 + batch) for batch in self.fresh]
        if self.stretches:
            fresh.append(self.inputs(seed=200, stretch=5))
        return fresh


def call(model: nn.Module, inputs: Inputs) -> Any:
    """``model(inputs)``, with the inputs unpacked as ``dummy_input`` is."""
    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    if inputs and isinstance(inputs[-1], dict):
        return model(*inputs[:-1], **inputs[-1])
    return model(*inputs)


def images(channels: int, *size: int) -> InputMaker:
    """Normal noise of shape ``(batch, channels, *size)``."""

    def make(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
        return torch.randn(batch, channels, *size, generator=generator)

    return make


def sequences(length: int, width: int) -> InputMaker:
    """Normal noise of shape ``(batch, length + stretch, width)``."""

    def make(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
        return torch.randn(batch, length + stretch, width, generator=generator)

    return make


def tokens(vocabulary: int, length: int) -> InputMaker:
    """Token ids of shape ``(batch, length + stretch)``."""

    def make(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
        return torch.randint(vocabulary, (batch, length + stretch), generator=generator)

    return make


class Zoo(dict[str, Specimen]):
    """Specimens by name; used as a decorator on a model class or factory it adds one."""

    def add(self, specimen: Specimen) -> None:
        """Adds a specimen under its name, which must be new."""
        if specimen.name in self:
            raise ValueError(f"there are two specimens called {specimen.name!r}")
        self[specimen.name] = specimen

    def __call__(self, make: InputMaker, **options: Any) -> Callable[[Any], Any]:
        """Registers what it decorates under its name in snake case."""

        def register(build: Any) -> Any:
            name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", build.__name__).lower()
            self.add(Specimen(name, build, make, **options))
            return build

        return register
