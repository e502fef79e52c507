"""The same forward pass on inputs of other sizes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping

import torch
from torch import Tensor

from maskprop.graph.graph import Graph
from maskprop.graph.structure import map_each_once, tensors_in
from maskprop.graph.trace import Inputs

Key = Callable[[int, int], Hashable]


def at_other_sizes(inputs: Inputs, run: Callable[[Inputs], Graph | None]) -> Iterator[Graph]:
    """Passes in which the sizes of the inputs are others, each of those that ``forward`` takes in one of them at least.

    One pass is enough for most models: all sizes are changed but one, the channels, and each by another factor.
    Axes that are equally long may have to stay so, as those of a sequence and its mask.

    Args:
        inputs: the dummy input.
        run: records a pass, or says ``None`` where ``forward`` refuses the inputs.
    """
    groups = _groups(inputs, _by_axis)
    for kept in (None, *groups):
        changed = [g for g in groups if g != kept]
        graph = run(_resized(inputs, {g: 2.0 + i for i, g in enumerate(changed)}, _by_axis)) if changed else None
        if graph is not None:
            yield graph
            if kept is not None:
                yield from _alone(inputs, run, kept, _by_axis)
            return
    for group in _groups(inputs, _by_size):
        yield from _alone(inputs, run, group, _by_size)


def _alone(inputs: Inputs, run: Callable[[Inputs], Graph | None], group: Hashable, key: Key) -> Iterator[Graph]:
    """A pass in which only one group of axes is of another size: longer, or shorter where there is a longest size.

    Where ``forward`` takes neither, its axes may be equal by chance, as a batch that is as large as the channels are.
    """
    for factor in (2.0, 0.5):
        graph = run(_resized(inputs, {group: factor}, key))
        if graph is not None:
            yield graph
            return
    if key is _by_size:
        for one in _groups(inputs, _by_axis):
            if isinstance(one, tuple) and one[0] == group:
                yield from _alone(inputs, run, one, _by_axis)


def _by_axis(size: int, axis: int) -> Hashable:
    return size, axis


def _by_size(size: int, axis: int) -> Hashable:
    return size


def _groups(inputs: Inputs, key: Key) -> list[Hashable]:
    """The axes of the inputs that change together; one of size 1 is there to be broadcast, unless it is the batch."""
    found = (
        key(size, axis)
        for _, tensor in tensors_in(inputs)
        for axis, size in enumerate(tensor.shape)
        if size > 1 or (size == 1 and axis == 0)
    )
    return list(dict.fromkeys(found))


def _resized(inputs: Inputs, factors: Mapping[Hashable, float], key: Key) -> Inputs:
    def resize(tensor: Tensor) -> Tensor:
        for axis, size in enumerate(tensor.shape):
            length = int(size * factors.get(key(size, axis), 1.0)) if size > 1 or axis == 0 else size
            if 0 < length < size:
                tensor = tensor.narrow(axis, 0, length)
            elif length > size:
                tensor = torch.cat([tensor] * (length // size), axis)
        return tensor

    found: Inputs = map_each_once(inputs, resize)
    return found
