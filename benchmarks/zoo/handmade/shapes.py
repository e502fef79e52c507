"""Small networks whose ``forward`` moves elements about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..specimen import Inputs, Zoo, images, sequences

SHAPES = Zoo()


class ConvPair(nn.Module):
    """Two convolutions of the image, a third that reads what a subclass makes of them, a linear head."""

    def __init__(self, first: int = 8, second: int = 8, joined: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, first, 3, padding=1), nn.Conv2d(3, second, 3, padding=1)
        self.c, self.head = nn.Conv2d(joined, 10, 3, padding=1), nn.Linear(10, 4)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.c(self.join(F.relu(self.a(x)), F.silu(self.b(x))))).mean((2, 3)))


pair = SHAPES(images(3, 8, 8))


@pair
class Multiply(ConvPair):
    """A zero on either side makes the product zero."""

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b


@pair
class Divide(ConvPair):
    """A denominator that is never zero."""

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a / (1.0 + b.abs()) - 0.5


@pair
class Concat(ConvPair):
    """Parts of different width."""

    def __init__(self) -> None:
        super().__init__(6, 10, 16)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a, b], 1)


@pair
class SplitSwap(ConvPair):
    """Uneven split, then joined in another order with a part used twice."""

    def __init__(self) -> None:
        super().__init__(8, 8, 19)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        small, large = a.split([3, 5], 1)
        return torch.cat([large, b, small, small], 1)


@pair
class ChunkGate(ConvPair):
    """A gated linear unit written with chunk: its halves are coupled."""

    def __init__(self) -> None:
        super().__init__(8, 4, 4)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        value, gate = a.chunk(2, 1)
        return value * torch.sigmoid(gate) + b


@pair
class StackMax(ConvPair):
    """Maxout: stacked along a new axis and reduced over it."""

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack([a, b], 1).amax(1) + torch.maximum(a, b)


@pair
class Maxout(ConvPair):
    """Pairs of neighbouring channels compete."""

    def __init__(self) -> None:
        super().__init__(16, 8, 8)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.unflatten(1, (8, 2)).max(2).values + b


@pair
class SliceWrite(ConvPair):
    """Part of a tensor is overwritten in place by another."""

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = a.clone()
        y[:, :3] = b[:, :3] * 2
        y[:, 5] += 1.0
        return y


@pair
class NewZerosWrite(ConvPair):
    """Parts are written into a tensor of zeros."""

    def __init__(self) -> None:
        super().__init__(8, 8, 16)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = a.new_zeros(a.size(0), 16, *a.shape[2:])
        y[:, :8] = a
        y[:, 8:] = b
        return y


@pair
class InPlace(ConvPair):
    """relu_, add_, mul_ and an in-place view."""

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(b).relu_().mul_(0.5)
        a.flatten(2).sub_(0.1)
        return a


@pair
class Interleave(ConvPair):
    """Channels of two tensors alternate; every second one is flipped back."""

    def __init__(self) -> None:
        super().__init__(8, 8, 16)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack([a, b.flip(1)], 2).flatten(1, 2)


@pair
class RollChannels(ConvPair):
    """Rolled, permuted by index, and read with a step along channels."""

    def __init__(self) -> None:
        super().__init__(8, 8, 12)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a.roll(3, 1)[:, self.order], b[:, ::2]], 1)


@pair
class RepeatChannels(ConvPair):
    """Channels repeated as blocks and one by one."""

    def __init__(self) -> None:
        super().__init__(4, 4, 16)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a.repeat(1, 2, 1, 1), b.repeat_interleave(2, 1)], 1)


@pair
class SumChannels(ConvPair):
    """Reductions over channels: each channel only adds to them; a spatial gate out of mean and max."""

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        gate = torch.cat([a.mean(1, keepdim=True), a.amax(1, keepdim=True)], 1).sum(1, keepdim=True)
        return b * torch.sigmoid(gate)


@pair
class SpaceToDepth(ConvPair):
    """Four shifted slices side by side (YOLO's focus layer)."""

    def __init__(self) -> None:
        super().__init__(8, 8, 64)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = torch.cat([a, b], 1)
        return torch.cat([y[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


@pair
class TransposedChannels(ConvPair):
    """Channels last, a linear layer there, and back."""

    def __init__(self) -> None:
        super().__init__(8, 12, 12)
        self.linear = nn.Linear(8, 12)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (self.linear(a.permute(0, 2, 3, 1)) * b.movedim(1, -1)).permute(0, 3, 1, 2)


@SHAPES(images(1, 28, 28))
class HardNumber(nn.Module):
    """PyTorch's MNIST example: ``view(-1, 320)`` does not fail with fewer columns, it halves the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
        self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.view(-1, 320)))
        return F.log_softmax(self.fc2(x), dim=1)


@SHAPES(images(3, 8, 8))
class HardSplit(nn.Module):
    """Sizes written in ``forward`` of a child: a split and a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = HardSplitInner(), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.inner(x).mean((2, 3)))


class HardSplitInner(nn.Module):
    """The child of :class:`HardSplit`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.split(F.relu(self.conv1(x)), 8, dim=1)
        return self.conv2(first) + F.relu(self.conv3(second)).view(-1, 6, 6, 6)


@SHAPES(images(3, 8, 8))
class ShapeAttribute(nn.Module):
    """Shapes held in attributes: a tuple for a view, an int for a split."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2 * width, 3, stride=2)
        self.width, self.grid, self.flat = width, (2, width, 9), width * 9
        self.fc1, self.fc2 = nn.Linear(self.flat, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x)).flatten(2)
        halves = x.view(-1, *self.grid)
        first, second = x.split(self.width, 1)
        return self.fc2(F.relu(self.fc1((halves.sum(1) + first * second).reshape(-1, self.flat))))


@SHAPES(images(3, 16, 16))
class PyramidAdd(nn.Module):
    """A feature pyramid: laterals, nearest upsampling to a size read from a tensor, sums, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.c2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.lateral1, self.lateral2 = nn.Conv2d(8, 6, 1), nn.Conv2d(12, 6, 1)
        self.out1, self.out2 = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        c1 = F.relu(self.c1(x))
        top = self.lateral2(F.relu(self.c2(c1)))
        low = self.lateral1(c1) + F.interpolate(top, size=c1.shape[-2:], mode="nearest")
        return {"p1": self.out1(low), "p2": self.out2(top)}


@SHAPES(images(3, 8, 8))
class PaddedShortcut(nn.Module):
    """CIFAR ResNet's option A: a strided slice, padded with zero channels on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)
        return self.fc(F.relu(self.norm(self.conv(x)) + shortcut).mean((2, 3)))


@SHAPES(sequences(6, 12), stretches=True)
class GatedUnits(nn.Module):
    """GLU, GEGLU with the halves in one layer, SwiGLU with two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 20), nn.Linear(10, 24)
        self.gate, self.up, self.down = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.b(F.glu(self.a(x), dim=-1)).chunk(2, dim=-1)
        x = value * F.gelu(gate)
        return self.down(F.silu(self.gate(x)) * self.up(x))


@SHAPES(sequences(6, 12))
class Mixer(nn.Module):
    """MLP-Mixer: one linear layer over positions, one over channels, residuals around both."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.token1, self.token2 = nn.Linear(6, 10), nn.Linear(10, 6)
        self.channel1, self.channel2 = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.token2(F.gelu(self.token1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.channel2(F.gelu(self.channel1(self.norm2(x))))
        return self.head(x.mean(1))


@SHAPES(images(3, 12, 12))
class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, layer norm over channels in the last axis, MLP, layer scale, residual."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, stride=2)
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


def index_pairs(batch: int, stretch: int, generator: torch.Generator) -> Inputs:
    """Features and positions to gather from them."""
    return (
        torch.randn(batch, 6, 12, generator=generator),
        torch.randint(6, (batch, 4), generator=generator),
    )


@SHAPES(index_pairs)
class GatherRows(nn.Module):
    """Positions chosen by an input, gathered for all channels at once."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.fc1(x))
        x = x.gather(1, index[..., None].expand(-1, -1, x.size(-1)))
        return self.fc2(x)
