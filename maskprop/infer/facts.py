"""Facts about recorded values: what is known before any input is seen.

All tensors here are *broadcastable* over the value that they describe: the same number of axes, size 1 along
an axis where nothing varies. A convolution's activation needs ``(1, C, 1, 1)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


class Fact:
    """Which elements of a value are the same for every model input, and what they are.

    Args:
        known: bool, broadcastable over the value.
        zero: bool, broadcastable; a subset of ``known``.
        value: the value where it is known (anything elsewhere), floating values in float64; or a function that
            computes it when it is asked for.
        plain: wholly known and not touched by any mask. Such a value counts as nowhere zero and is not computed
            unless a constant needs it.
        row_axis: along this axis the elements sum to one (the result of a softmax), else ``None``.
        again: compute the value whenever it is asked for, and do not hold it.
    """

    __slots__ = ("_value", "again", "known", "nothing", "plain", "row_axis", "total", "zero")

    def __init__(
        self,
        known: Tensor,
        zero: Tensor,
        value: Tensor | Callable[[], Tensor],
        plain: bool = False,
        row_axis: int | None = None,
        again: bool = False,
    ) -> None:
        self.again = again
        self.known = known
        self.zero = zero
        self._value = value
        self.plain = plain
        self.row_axis = row_axis
        self.total = plain or bool(known.all())
        self.nothing = not self.total and known.numel() == 1

    @staticmethod
    @functools.cache
    def unknown(ndim: int, row_axis: int | None = None) -> Fact:
        """Nothing is known."""
        false = everywhere(False, ndim)
        return Fact(false, false, torch.zeros((1,) * ndim, dtype=torch.float64, device="cpu"), row_axis=row_axis)

    @staticmethod
    def constant(ndim: int, value: Callable[[], Tensor], again: bool = False) -> Fact:
        """Wholly known and unmasked; the value is computed on demand."""
        return Fact(everywhere(True, ndim), everywhere(False, ndim), value, plain=True, again=again)

    @staticmethod
    def zeros(where: Tensor) -> Fact:
        """Known to be zero at some places, nothing known elsewhere."""
        return Fact(where, where, torch.zeros((1,) * where.ndim, dtype=torch.float64))

    @staticmethod
    def of_value(value: Tensor, known: Tensor | None = None) -> Fact:
        """Known where ``known`` says (everywhere by default), with the zeros read from the value.

        What the value holds elsewhere is cleared, but is not spread for it: where heads are known that share one
        value, as under a causal mask, that value is held once.
        """
        if known is None:
            known = everywhere(True, value.ndim)
        else:
            somewhere = any_over(known, [d for d in range(known.ndim) if value.shape[d] == 1])
            value = torch.where(somewhere, value, _zero(value.dtype))
        return Fact(known, known & (value == 0), value)

    def value(self) -> Tensor:
        """The value, broadcastable, valid where ``known``."""
        if isinstance(self._value, Tensor):
            return self._value
        value = as_double(self._value())
        if not self.again:
            self._value = value
        return value

    def map(self, move: Callable[[Tensor], Tensor]) -> Fact:
        """The fact of a moved value; ``move`` takes any tensor that is broadcastable over the value."""
        return Fact(move(self.known), move(self.zero), lambda: move(self.value()), self.plain, again=self.again)

    def without(self, where: Tensor) -> Fact:
        """The same fact with less known."""
        return Fact(self.known & ~where, self.zero & ~where, self._value, False, self.row_axis, self.again)

    def with_rows(self, axis: int | None) -> Fact:
        """The same fact, with an axis along which the elements sum to one."""
        return self if axis is None else Fact(self.known, self.zero, self._value, self.plain, axis, self.again)

    def __repr__(self) -> str:
        known, zero = int(self.known.sum()), int(self.zero.sum())
        return f"Fact(known={known}/{self.known.numel()}, zero={zero}, shape={tuple(self.known.shape)})"


@functools.cache
def everywhere(holds: bool, ndim: int) -> Tensor:
    """The same bool over a whole value of ``ndim`` axes; shared, so never written to."""
    return torch.full((1,) * ndim, holds, device="cpu")


@functools.cache
def _zero(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device="cpu")


def as_double(t: Tensor) -> Tensor:
    """Floating values are kept in float64, so that constants are rounded once."""
    return t.detach().double() if t.is_floating_point() else t.detach()


def broadcast_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """What ``torch.broadcast_shapes`` says, in a hundredth of its time."""
    return np.broadcast_shapes(*map(tuple, shapes))


def lead(t: Tensor, ndim: int) -> Tensor:
    """Add axes of size 1 in front, up to ``ndim``."""
    return t.reshape((1,) * (ndim - t.ndim) + t.shape)


def squash(t: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """Drop those of the axes (of all, by default) along which a tensor does not vary."""
    for axis in reversed(range(t.ndim) if axes is None else axes):
        if t.shape[axis] > 1 and not differs_along(t, axis):
            t = t.narrow(axis, 0, 1)
    return t


def differs_along(t: Tensor, axis: int) -> bool:
    """Whether a tensor varies along an axis."""
    return t.shape[axis] > 1 and not torch.equal(t, t.narrow(axis, 0, 1).expand_as(t))


def any_over(t: Tensor, dims: Sequence[int]) -> Tensor:
    """``any`` over the axes, kept as size 1."""
    for d in dims:
        if t.shape[d] != 1:
            t = t.any(dim=d, keepdim=True)
    return t


def all_over(t: Tensor, dims: Sequence[int]) -> Tensor:
    """``all`` over the axes, kept as size 1."""
    for d in dims:
        if t.shape[d] != 1:
            t = t.all(dim=d, keepdim=True)
    return t


def reduce_to(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo broadcasting: ``any`` over the axes that ``shape`` lacks or has with size 1."""
    extra = t.ndim - len(shape)
    if extra > 0:
        t = any_over(t, range(extra))
        t = t.reshape(t.shape[extra:])
    return any_over(t, [d for d, n in enumerate(shape) if n == 1])


def spread(t: Tensor, dims: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Expand the axes ``dims`` of a broadcastable tensor to their full size."""
    sizes = list(t.shape)
    for d in dims:
        sizes[d] = shape[d]
    return t.expand(sizes)


def bool_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``exists k: a[..., m, k] and b[..., k, n]`` for broadcastable bools; size 1 stands for a uniform axis."""
    if a.shape[-1] == 1 and b.shape[-2] == 1:
        return a & b
    if a.shape[-1] == 1:
        return squash(a & b.any(-2, keepdim=True))
    if b.shape[-2] == 1:
        return squash(a.any(-1, keepdim=True) & b)
    return squash(torch.matmul(a.float(), b.float()) > 0)
