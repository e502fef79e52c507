"""What stands in a layer's place when its output is the same for every input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Constant(nn.Module):
    """What is left of a layer whose output is the same for every input: its shape, and a bias.

    Attributes:
        axis: of the channels in the output, counted from the end.
        size: how many there are.
        window: kernel, stride, padding and dilation along the spatial axes (a convolution's), or ``None`` where
            the output is as large as the input.
        bias: ``(size,)``, what the layer puts out; without one it is zero.
    """

    axis: int
    size: int
    window: Window | None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The constant, as large as the layer's output for the first tensor among the arguments."""
        like = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        shape = shape_of_constant(like.shape, self.axis, self.size, self.window)
        bias = getattr(self, "bias", None)
        if bias is None:
            return like.new_zeros(shape)
        column: Tensor = bias.reshape(-1, *[1] * (-1 - self.axis))
        return column.expand(shape).clone()

    def extra_repr(self) -> str:
        """Its size."""
        return f"{self.size}, axis={self.axis}"


def shape_of_constant(like: Sequence[int], axis: int, size: int, window: Window | None) -> list[int]:
    """The shape of what a constant puts out, by that of what it is given."""
    shape = list(like)
    shape[axis] = size
    if window is not None:
        for i, (kernel, stride, padding, dilation) in enumerate(zip(*window, strict=True), axis + 1):
            shape[i] = (shape[i] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return shape
