"""Parameters, modules and buffers that serve several ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import case, images, vectors


@case(vectors(12), {"enc.weight": ([0, 1, 2],), "enc.bias": ([0, 1, 2],)}, {"enc.weight": (5, 12), "enc.bias": (5,)})
class TiedAuto(nn.Module):
    """autoencoder: decoder = enc.weight.t()"""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(12, 8)
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.enc(x)), self.enc.weight.t(), self.bias)


@case(vectors(12), {"w": ([0, 1, 8, 9],)}, {"w": (12, 12), "out.weight": (4, 6)})
class SlicedHalves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 12) * 0.3)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(x, self.w[:8])) * F.linear(x, self.w[8:]))


@case(images(4, 6), {"w": ([0, 1],)}, {"w": (6, 4), "out.weight": (4, 6, 1, 1)})
class ConvAndLinear(nn.Module):
    """one parameter as 1x1 conv and linear"""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 4))
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.conv2d(x, self.w[:, :, None, None])
        b = F.linear(x.mean((2, 3)), self.w)
        return self.out(F.relu(a * b[:, :, None, None]))


@case(vectors(12), {"l.weight": ([0, 1],), "l.bias": ([0, 1],)}, {})
class TwiceSame(nn.Module):
    """square linear called twice: rows = its own inputs, which are read"""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 12)
        self.l = nn.Linear(12, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.l(torch.relu(self.l(x)))))


@case(
    vectors(12),
    {"l.weight": ([0, 1],), "l.bias": ([0, 1],), "inp.weight": ([0, 1],), "inp.bias": ([0, 1],)},
    {"inp.weight": (10, 12), "inp.bias": (10,), "l.weight": (10, 10), "l.bias": (10,), "out.weight": (3, 10)},
)
class TwiceSame2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 12)
        self.l = nn.Linear(12, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inp(x))
        return self.out(torch.relu(self.l(torch.relu(self.l(x)))))


@case(
    vectors(12),
    {"block1.l.weight": ([0, 1],), "block1.l.bias": ([0, 1],)},
    {"block1.l.weight": (6, 12), "block1.l.bias": (6,), "out.weight": (3, 6), "out2.weight": (3, 6)},
)
class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block1 = nn.Module()
        self.block1.l = nn.Linear(12, 8)
        self.block2 = self.block1
        self.out = nn.Linear(8, 3)
        self.out2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.block1.l(x))) + self.out2(F.relu(self.block2.l(-x)))


@case(
    vectors(12),
    {"fc1.weight": ([0, 1],), "fc1.bias": ([0, 1],)},
    {"fc1.weight": (6, 12), "fc1.bias": (6,), "fc2.weight": (4, 6)},
)
class BufMask(nn.Module):
    """a buffer scales"""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 8)
        self.fc2 = nn.Linear(8, 4)
        self.register_buffer("scale", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)) * self.scale)


@case(vectors(12), {}, {}, rand=False)
class BufZero(nn.Module):
    """a buffer of zeros and ones as a mask: zeros in buffers are values"""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 8)
        self.fc2 = nn.Linear(8, 4)
        self.register_buffer("keep", torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)) * self.keep)


@case(
    vectors(12),
    {"fc1.weight": ([0, 1],), "fc1.bias": ([0, 1],)},
    {"fc1.weight": (6, 12), "fc1.bias": (6,), "fc2.weight": (4, 6)},
)
class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x.relu_()
        x.mul_(2)
        x += x * 0.5
        x.clamp_(max=3.0)
        return self.fc2(x)


@case(
    vectors(12),
    {"fc1.weight": ([0, 1],), "fc1.bias": ([0, 1],)},
    {"fc1.weight": (6, 12), "fc1.bias": (6,), "fc2.weight": (4, 6)},
)
class Control(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        if self.fc2.bias.sum().item() > -1000000000.0:
            h = h * 2
        if x.sum() > 1000000000.0:
            h = h + 100
        return self.fc2(F.relu(h))


@case(
    images(1, 28),
    {"conv2.weight": ([0, 1, 2, 3],), "conv2.bias": ([0, 1, 2, 3],)},
    {"conv2.weight": (16, 10, 5, 5), "conv2.bias": (16,), "fc.weight": (10, 256)},
)
class Number(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.fc = nn.Linear(320, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc(x.view(-1, 320))
