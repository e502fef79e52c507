"""Sizes that only ``forward`` knows, in the ways that authors write them down."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..specimen import Zoo, images, sequences
from .attention import merge_heads, split_heads

FORWARDS = Zoo()


class PartialConv(nn.Module):
    """Convolves the first channels alone; which way of doing so is put on the object when it is built."""

    def __init__(self, width: int, slices: bool) -> None:
        super().__init__()
        self.mixed, self.untouched = width // 4, width - width // 4
        self.conv = nn.Conv2d(self.mixed, self.mixed, 3, padding=1, bias=False)
        self.forward = self.forward_slices if slices else self.forward_cat

    def forward_slices(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, : self.mixed] = self.conv(x[:, : self.mixed])
        return x

    def forward_cat(self, x: torch.Tensor) -> torch.Tensor:
        first, rest = x.split([self.mixed, self.untouched], 1)
        return torch.cat([self.conv(first), rest], 1)


@FORWARDS(images(3, 8, 8))
class ForwardOnTheObject(nn.Module):
    """Two attributes that hold one split between them, each of other sizes in each block."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 1), nn.BatchNorm2d(width)
        self.partial = nn.ModuleList(PartialConv(width, slices) for slices in (False, True))
        self.mix, self.head = nn.Conv2d(width, width, 1), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        for partial in self.partial:
            x = self.mix(partial(x)).relu()
        return self.head(x.mean((2, 3)))


class ImageAttention(nn.Module):
    """Sizes read from the input, which lies in memory channels first; the scale is that of the head dim."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (split_heads(layer(x), self.num_heads) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


@FORWARDS(images(3, 4, 4))
class ChannelsFirstAttention(nn.Module):
    """An image as a sequence, by views alone."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Conv2d(3, width, 1), ImageAttention(width, heads), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x)).mean(1))


@FORWARDS(sequences(6, 12))
class SplitByAttributes(nn.Module):
    """q, k and v cut from each head by a list of attributes, as many heads as dims, and slices written in place."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = heads, width // heads, width // heads
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.stem, self.head = nn.Linear(12, width), nn.Linear(width, 3)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x[:, :5].index_add_(0, torch.arange(x.size(0)), self.position.expand(x.size(0), -1, -1))
        qkv = self.qkv(x).view(x.size(0), -1, self.heads, 2 * self.key_dim + self.value_dim)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.head(x + self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v))))


class ConvPositions(nn.Module):
    """Convolves the values of the first heads alone; a list says how many channels those are."""

    def __init__(self, dims: int, first: int, rest: int) -> None:
        super().__init__()
        self.splits = [first * dims, rest * dims]
        self.conv = nn.Conv1d(first * dims, first * dims, 3, padding=1, groups=first * dims)

    def forward(self, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, length, dims = q.shape
        first, rest = v.transpose(-1, -2).reshape(batch, heads * dims, length).split(self.splits, dim=1)
        v = torch.cat([self.conv(first), rest], 1).reshape(batch, heads, dims, length).transpose(-1, -2)
        return q * v


class ConvAttention(nn.Module):
    """The head size is computed from the input; positions come from a module that other blocks share."""

    def __init__(self, width: int, heads: int, positions: ConvPositions) -> None:
        super().__init__()
        self.num_heads, self.scale, self.positions = heads, (width // heads) ** -0.5, positions
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = self.scale * (q @ (k.softmax(2).transpose(-1, -2) @ v)) + self.positions(q, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


@FORWARDS(sequences(6, 24))
class SharedPositions(nn.Module):
    """Blocks of which each needs a forward, around one module that needs one, too."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        positions = ConvPositions(width // heads, 1, heads - 1)
        self.blocks = nn.ModuleList(ConvAttention(width, heads, positions) for _ in range(2))
        self.stem, self.head = nn.Linear(24, width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)
