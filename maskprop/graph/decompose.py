"""Ops that are a few others in one: recorded as these, whose sizes the replay can compare one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _pixel_shuffle(x: Tensor, r: int) -> Tensor:
    *batch, c, h, w = x.shape
    n = len(batch)
    cut = x.view(*batch, c // r**2, r, r, h, w).permute(*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return cut.reshape(*batch, c // r**2, h * r, w * r)


def _pixel_unshuffle(x: Tensor, r: int) -> Tensor:
    *batch, c, h, w = x.shape
    n = len(batch)
    cut = x.view(*batch, c, h // r, r, w // r, r).permute(*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return cut.reshape(*batch, c * r**2, h // r, w // r)


def _channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, c, *space = x.shape
    return x.view(batch, groups, c // groups, *space).transpose(1, 2).reshape(batch, c, *space)


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    sumdim: list[int],
    *_: int,
) -> Tensor:
    if (expand1, expand2, expand3, sumdim) == ([1, 3], [0], [1, 2], [2, 3]):  # nn.Bilinear: y = a[n,i] b[o,i,j] c[n,j]
        o, i, j = b.shape
        half = a.mm(b.permute(1, 0, 2).reshape(i, o * j)).view(len(a), o, j)
        return half.bmm(c.unsqueeze(-1)).squeeze(-1)
    factors = []
    for factor, axes in ((a, expand1), (b, expand2), (c, expand3)):
        for axis in axes:
            factor = factor.unsqueeze(axis)
        factors.append(factor)
    return (factors[0] * factors[1] * factors[2]).sum(sumdim)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(v, 2, [d for d in range(v.ndim) if d != dim % v.ndim], keepdim=True)
    return v * (g / norm), norm


def _as_strided_(x: Tensor, size: list[int], stride: list[int], offset: int | None = None) -> Any:
    """The tensor as it is, where only strides that mean nothing differ: pooling to 1 x 1 marks channels last so."""
    same = list(x.shape) == list(size) and offset in (None, x.storage_offset())
    if same and all(n == 1 or a == b for n, a, b in zip(size, x.stride(), stride, strict=True)):
        return x
    return NotImplemented


# By schema name; each takes the op's arguments and returns its results, or NotImplemented: then it is itself recorded.
DECOMPOSED: dict[str, Callable[..., Any]] = {
    "aten::_trilinear": _trilinear,
    "aten::_weight_norm_interface": _weight_norm,
    "aten::as_strided_": _as_strided_,
    "aten::pixel_shuffle": _pixel_shuffle,
    "aten::pixel_unshuffle": _pixel_unshuffle,
    "aten::channel_shuffle": _channel_shuffle,
}
