"""Results of ops on fake tensors, without most of what a fake tensor mode does.

Such a mode spends far more time on an op than the arithmetic of its sizes takes. What it said of an op is remembered
here by the op's *signature*: its sizes, strides, dtypes and numbers. A model repeats its blocks, and its compact twin
is traced again and again, so most ops have been seen. The kernels of convolutions, batch norms and matrix products,
which make up most of a first trace, are written in Python and take up to a millisecond; functions here say the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Shortcut = Callable[..., "Tensor | tuple[Tensor, ...] | None"]

_NHWC, _NHWC_ORDER = torch.channels_last, (0, 2, 3, 1)
_KINDS = (FakeTensor, Tensor, nn.Parameter)
_SEEN: dict[Any, Any] = {}  # signature -> recipe of the result
_MOST = 1 << 16  # signatures


def run_on_fakes(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The op's result on fake or meta tensors.

    Args:
        op: an overload.
        args: with real parameters and fake activations, as dispatched.
        kwargs: as dispatched.
    """
    fn = _SHORTCUTS.get(op)
    found = None if fn is None else fn(*args, **kwargs)
    if found is not None:
        return found
    key = _signature_of(op, args, kwargs)
    recipe = None if key is None else _SEEN.get(key)
    if recipe is not None:
        return _follow(recipe, args, _fake_mode())
    result = op(*args, **kwargs)
    recipe = None if key is None else _recipe(result, args)
    if recipe is not None:
        if len(_SEEN) >= _MOST:
            _SEEN.clear()
        _SEEN[key] = recipe
    return result


class QuickFakes(TorchDispatchMode):
    """Above a fake tensor mode: answers what it can in its place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see the recorder

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_on_fakes(op, args, kwargs or {})


def as_fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake tensor of a real one."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor._is_view() or tensor.requires_grad:
        return mode.from_tensor(tensor)
    return _made(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, mode)


def new_fake(
    mode: FakeTensorMode, shape: Sequence[int], dtype: torch.dtype, device: torch.device, order: Sequence[int] = ()
) -> Tensor:
    """A dense fake tensor, whose axes lie in memory in this order, the slowest first; in the usual one by default."""
    return _made(shape, _strides(shape, order), dtype, device, mode)


# -- what was seen ------------------------------------------------------------------------------


class _UnusualError(Exception):
    """Something beyond sizes decides over the result."""


def _signature_of(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """All that the result's sizes and strides depend on; ``None`` if that cannot be told."""
    if not _is_regular(op):
        return None
    try:
        key = op, _signature(args), tuple((k, _signature(v)) for k, v in kwargs.items()), torch.get_default_dtype()
        hash(key)
    except (_UnusualError, TypeError):  # TypeError: an argument that cannot be hashed
        return None
    return key


def _signature(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        fake = isinstance(arg, FakeTensor)
        if type(arg) not in _KINDS or arg.layout is not torch.strided or (fake and arg.constant is not None):  # type: ignore[attr-defined]
            raise _UnusualError
        device = arg.fake_device if fake else arg.device  # type: ignore[attr-defined]
        return fake, arg.shape, arg.stride(), arg.dtype, device
    if isinstance(arg, (list, tuple)):
        return tuple([_signature(a) for a in arg])
    return type(arg), arg  # 1, 1.0 and True are equal


@functools.cache
def _is_regular(op: OpOverload) -> bool:
    asks = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view} & set(op.tags)
    return op.namespace == "aten" and not asks


def _recipe(result: Any, args: Sequence[Any]) -> Any:
    """How to make the result again: an argument's position, or sizes; ``None`` if it is neither."""
    if isinstance(result, (tuple, list)):
        parts = [_recipe(r, args) for r in result]
        return None if None in parts else (type(result), parts)
    for i, arg in enumerate(args):
        if result is arg:
            return i
    if type(result) not in _KINDS or result.layout is not torch.strided or result.is_complex():
        return None
    if isinstance(result, FakeTensor):
        return None if result.constant is not None else (*_dense(result), result.fake_device)
    return (*_dense(result), result.device) if result.is_meta else None


def _dense(t: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return t.shape, t.stride(), t.dtype


def _follow(recipe: Any, args: Sequence[Any], mode: FakeTensorMode | None) -> Any:
    if isinstance(recipe, int):
        return args[recipe]
    if isinstance(recipe[0], type):
        kind, parts = recipe
        return kind(_follow(part, args, mode) for part in parts)
    shape, strides, dtype, device = recipe
    return _made(shape, strides, dtype, device, mode)


def _made(
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    mode: FakeTensorMode | None,
) -> Tensor:
    with torch._C._DisableTorchDispatch():
        blank = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return blank if mode is None else _faked(mode, blank, device)


def _faked(mode: FakeTensorMode, blank: Tensor, device: torch.device) -> Tensor:
    """``FakeTensor(mode, blank, device)``, in the likeness of one: its constructor takes longer than most ops."""
    fake = Tensor._make_subclass(FakeTensor, blank, False, dispatch_device=True, device_for_backend_keys=device)
    vars(fake).update(_fake_state(device), fake_mode=mode)
    return fake


@functools.cache
def _fake_state(device: torch.device) -> dict[str, Any]:
    """What a fake tensor of a device holds, whatever its size."""
    with torch._C._DisableTorchDispatch():
        blank = torch.empty(0, device="meta")
    state = vars(FakeTensor(FakeTensorMode(), blank, device))
    return {name: value for name, value in state.items() if name != "fake_mode"}


def _fake_mode() -> FakeTensorMode | None:
    """The mode below the recorder, if there is one (meta tensors do without)."""
    found: FakeTensorMode | None = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return found


# -- ops whose kernels for meta tensors are slow ------------------------------------------------


def _blank(like: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A contiguous (or, for an image in that format, channels-last) tensor of another shape."""
    if not isinstance(like, FakeTensor):
        return None
    sizes = tuple(shape)
    nhwc = len(sizes) == 4 == like.ndim and not like.is_contiguous() and like.is_contiguous(memory_format=_NHWC)
    return _made(sizes, _strides(sizes, _NHWC_ORDER if nhwc else ()), like.dtype, like.fake_device, like.fake_mode)


def _strides(sizes: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Of a dense tensor, see :func:`new_fake`."""
    strides, step = [0] * len(sizes), 1
    for axis in reversed(order or range(len(sizes))):
        strides[axis] = step
        step *= max(1, sizes[axis])
    return tuple(strides)


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
    out, empty = _blank(x, x.shape), _blank(x, (x.shape[1] if training else 0,))
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


def _grouped_mm(a: Tensor, b: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor | None:
    """The fake kernel takes no float32, which real ones do."""
    if a.ndim != 2 or b.ndim != 3 or a.shape[1] != b.shape[1] or a.dtype != b.dtype or bias is not None or out_dtype:
        return None
    return _blank(a if isinstance(a, FakeTensor) else b, (a.shape[0], b.shape[2]))


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
    aten._grouped_mm.default: _grouped_mm,
}
