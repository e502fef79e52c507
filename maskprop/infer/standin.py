"""Layers that leave as a whole, as the later stages see them: results that are made out of nothing.

A layer whose result is the same for every input reads nothing any more. A constant stands in for it: its channels
are units of their own, which leave as their readers like, and whatever only the layer read is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from maskprop.graph.graph import shape_of
from maskprop.infer.coupling import Axis, Coupling, Labels
from maskprop.infer.facts import everywhere


@dataclass(frozen=True)
class Held:
    """The constant that a layer leaves.

    Attributes:
        name: of the bias that holds it.
        bias: that bias, if the layer has it already.
        value: ``(channels,)`` in float64, of the dense layer.
    """

    name: str
    bias: fx.Node | None
    value: Tensor


@dataclass(frozen=True)
class StandIn:
    """The result of one call of a layer that left.

    Attributes:
        result: of the call.
        axis: of its channels.
        like: the value whose sizes its other axes have, or ``None`` where they come from a window.
        held: the constant; without one it is zero.
    """

    result: fx.Node
    axis: int
    like: fx.Node | None
    held: Held | None

    def couple(self, c: Coupling) -> Labels:
        """Labels of the result: free along the channels, elsewhere those of the value that it is as large as."""
        shape = shape_of(self.result)
        given = None if self.like is None else c.labels_of(self.like)[self.axis]
        if given is not None:
            c.end(given, everywhere(False, given.ndim), "is read here")
        others: Labels = [None] * len(shape) if self.like is None else c.labels_of(self.like)
        labels = [None if axis == self.axis else c.uniform(a, [self.axis]) for axis, a in enumerate(others)]
        labels[self.axis] = own = c.axes(shape)[self.axis]
        if own is not None:
            c.nonempty.append(Axis(tuple(labels), self.axis))
            if self.held is not None and self.held.bias is not None:
                c.equal(c.labels_of(self.held.bias)[0], own.reshape(-1))
        return labels
