"""The same forward pass on inputs of other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from maskprop.graph.structure import map_each_once, tensors_in
from maskprop.graph.trace import Inputs

Pass = TypeVar("Pass")
# Axes that change together: those of a size, or of a size and a place.
Group = tuple[int, ...]
Key = Callable[[int, int], Group]


def at_other_sizes(inputs: Inputs, run: Callable[[Inputs], Pass | None]) -> Iterator[Pass]:
    """Passes in which the sizes of the inputs are others, each of those that ``forward`` takes in one of them at least.

    One pass is enough for most models: all sizes are changed but one, the channels, and each by another factor.
    Axes that are equally long may have to stay so, as those of a sequence and its mask.

    Args:
        inputs: the dummy input.
        run: records a pass, or says ``None`` where ``forward`` refuses the inputs.
    """
    groups = [g for g in _groups(inputs, _by_axis) if g[0] > 1 or g[1] == 0]
    for axis in _groups(inputs, _by_axis):
        if axis not in groups:  # it may be there to be broadcast, or a sequence of one
            yield from _alone(inputs, run, axis, _by_axis)
    for kept in (None, *groups):
        changed = [g for g in groups if g != kept]
        made = run(_resized(inputs, {g: 2.0 + i for i, g in enumerate(changed)}, _by_axis)) if changed else None
        if made is not None:
            yield made
            if kept is not None:
                yield from _alone(inputs, run, kept, _by_axis)
            return
    for group in _groups(inputs, _by_size):
        yield from _alone(inputs, run, group, _by_size)


def _alone(inputs: Inputs, run: Callable[[Inputs], Pass | None], group: Group, key: Key) -> Iterator[Pass]:
    """A pass in which only one group of axes is of another size: longer, or shorter where there is a longest size.

    Where ``forward`` takes neither, its axes may be equal by chance, as a batch that is as large as the channels are.
    """
    for factor in (2.0, 0.5) if group[0] > 1 else (2.0,):
        made = run(_resized(inputs, {group: factor}, key))
        if made is not None:
            yield made
            return
    if key is _by_size:
        for one in _groups(inputs, _by_axis):
            if _by_size(*one) == group:
                yield from _alone(inputs, run, one, _by_axis)


def _by_axis(size: int, axis: int) -> Group:
    return size, axis


def _by_size(size: int, axis: int) -> Group:
    return (size,) if size > 1 or axis == 0 else ()


def _groups(inputs: Inputs, key: Key) -> list[Group]:
    found = (key(size, axis) for _, tensor in tensors_in(inputs) for axis, size in enumerate(tensor.shape) if size)
    return [group for group in dict.fromkeys(found) if group]


def _resized(inputs: Inputs, factors: Mapping[Group, float], key: Key) -> Inputs:
    def resize(tensor: Tensor) -> Tensor:
        for axis, size in enumerate(tensor.shape):
            length = int(size * factors.get(key(size, axis), 1.0))
            if length < size:
                tensor = tensor.narrow(axis, 0, length)
            elif length > size:
                tensor = torch.cat([tensor] * (length // size), axis)
        return tensor

    found: Inputs = map_each_once(inputs, resize)
    return found
