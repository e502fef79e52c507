"""Results of the commonest ops on fake tensors, without running a fake kernel.

The fake kernels of convolution, batch norm and matrix products are written in Python and take up to a millisecond an
op, most of a trace. These functions give the same sizes, strides and dtypes; where one declines (``None``), the fake
kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensor

aten = torch.ops.aten
Shortcut = Callable[..., "Tensor | tuple[Tensor, ...] | None"]


def shortcut(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The op's result on fake tensors, or ``None`` if the fake kernel has to tell.

    Args:
        op: a pure overload.
        args: with real parameters and fake activations, as dispatched.
        kwargs: as dispatched.
    """
    fn = _SHORTCUTS.get(op)
    if fn is not None:
        return fn(*args, **kwargs)
    if torch.Tag.pointwise not in op.tags or kwargs:
        return None
    if not op._schema.is_mutable:
        return _pointwise(args)
    others = [a for a in args[1:] if isinstance(a, Tensor)]
    if isinstance(args[0], FakeTensor) and all(a.shape == args[0].shape for a in others):
        return args[0]  # an in-place op hands back its argument
    return None


def _blank(like: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A contiguous (or, for an image in that format, channels-last) fake tensor of another shape."""
    mode = getattr(like, "fake_mode", None)
    if mode is None:
        return None
    nhwc = (
        len(shape) == 4 == like.ndim
        and not like.is_contiguous()
        and like.is_contiguous(memory_format=torch.channels_last)
    )
    layout = torch.channels_last if nhwc else torch.contiguous_format
    with torch._C._DisableTorchDispatch():
        blank = torch.empty(tuple(shape), dtype=like.dtype, device="meta", memory_format=layout)
    return FakeTensor(mode, blank, like.device)


def _pointwise(args: Sequence[Any]) -> Tensor | None:
    """Floating tensors of one shape, dtype and dense layout, and Python numbers."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not tensors or len(tensors) > 2 or any(isinstance(a, (list, tuple, bool, complex)) for a in args):
        return None
    first = tensors[0]
    if not first.is_floating_point():
        return None
    for other in tensors[1:]:
        if other.shape != first.shape or other.dtype != first.dtype or other.stride() != first.stride():
            return None
    if not (first.is_contiguous() or (first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last))):
        return None
    return _blank(first, first.shape)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor | None:
    dims = weight.ndim - 2
    if (
        x.ndim != weight.ndim
        or x.shape[1] != (weight.shape[0] if transposed else weight.shape[1] * groups)
        or x.dtype != weight.dtype
    ):
        return None  # the fake kernel says what is wrong

    def each(value: Any) -> list[int]:
        return list(value) * dims if len(value) == 1 else list(value)

    sizes = []
    for n, k, s, p, d, extra in zip(
        x.shape[2:],
        weight.shape[2:],
        each(stride),
        each(padding),
        each(dilation),
        each(output_padding),
        strict=True,
    ):
        sizes.append(
            (n - 1) * s - 2 * p + d * (k - 1) + extra + 1 if transposed else (n + 2 * p - d * (k - 1) - 1) // s + 1
        )
    if any(n < 1 for n in sizes):
        return None
    return _blank(x, (x.shape[0], weight.shape[1] * groups if transposed else weight.shape[0], *sizes))


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *args: Any
) -> tuple[Tensor, ...] | None:
    if (
        x.ndim < 2
        or not x.is_floating_point()
        or any(t is not None and t.shape[0] != x.shape[1] for t in (weight, bias, mean, var))
    ):
        return None
    out, empty = _pointwise([x]), _blank(x, (x.shape[1] if training else 0,))
    return None if out is None or empty is None else (out, empty, empty)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor | None:
    return _mm(a, b) if bias.ndim == 1 and bias.shape[0] in (1, b.shape[-1]) and bias.dtype == a.dtype else None


def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        return None
    return _blank(a if isinstance(a, FakeTensor) else b, (a.shape[0], b.shape[1]))


def _bmm(a: Tensor, b: Tensor) -> Tensor | None:
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1] or a.dtype != b.dtype:
        return None
    return _blank(a if isinstance(a, FakeTensor) else b, (a.shape[0], a.shape[1], b.shape[2]))


def _empty(size: Sequence[int], **kwargs: Any) -> Tensor | None:
    if list(size) != [0]:  # batch norm makes one of these a call
        return None
    with torch._C._DisableTorchDispatch():
        return torch.empty(0)


_SHORTCUTS: dict[OpOverload, Shortcut] = {
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: _batch_norm,
    aten.empty.memory_format: _empty,
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
}
