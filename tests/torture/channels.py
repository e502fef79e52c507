"""Channels that are shuffled, split, joined and gated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import ALL, case, images, vectors


@case(
    images(3, 6),
    {"c1.weight": ([0, 1, 6, 7],), "c1.bias": ([0, 1, 6, 7],)},
    {"c1.weight": (8, 3, 3, 3), "c1.bias": (8,), "g.weight": (12, 4, 1, 1)},
)
class ShuffleChannels(nn.Module):
    """grouped + shuffle; producers rows; first two of each of two groups"""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 12, 3, padding=1)
        self.g = nn.Conv2d(12, 12, 1, groups=2, bias=False)
        self.c2 = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.g(F.relu(self.c1(x))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.c2(x)


@case(
    images(3, 6),
    {"c1.weight": ([0, 1, 2, 3],), "c1.bias": ([0, 1, 2, 3],), "g.weight": ([0, 1, 2, 3],)},
    {"c1.weight": (8, 3, 3, 3), "c1.bias": (8,), "g.weight": (8, 4, 1, 1), "c2.weight": (4, 8, 1, 1)},
)
class ShuffleGroups(nn.Module):
    """whole group 0 of 3 dead"""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 12, 3, padding=1)
        self.g = nn.Conv2d(12, 12, 1, groups=3, bias=False)
        self.c2 = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.g(F.relu(self.c1(x))))
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.c2(x)


@case(
    images(3, 6),
    {"c1.weight": ([0, 1, 2, 3, 4, 8],), "c1.bias": ([0, 1, 2, 3, 4, 8],), "g.weight": ([0, 1, 2, 3, 4, 8],)},
    {"c1.weight": (6, 3, 3, 3), "c1.bias": (6,), "g.weight": (6, 3, 1, 1), "c2.weight": (4, 6, 1, 1)},
)
class ShuffleBoth(nn.Module):
    """group 0 dead and channel 0 of other groups"""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 12, 3, padding=1)
        self.g = nn.Conv2d(12, 12, 1, groups=3, bias=False)
        self.c2 = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.g(F.relu(self.c1(x))))
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.c2(x)


@case(
    images(3, 6),
    {"c1.weight": ([0, 1, 2, 3, 4, 8],), "c1.bias": ([0, 1, 2, 3, 4, 8],), "g.weight": ([0, 1, 2, 3, 4, 8],)},
    {"c1.weight": (6, 3, 3, 3), "c1.bias": (6,), "g.weight": (6, 3, 1, 1), "c2.weight": (4, 6, 1, 1)},
)
class ShuffleBothAttr(nn.Module):
    """as ShuffleBoth, with self.groups"""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 3
        self.c1 = nn.Conv2d(3, 12, 3, padding=1)
        self.g = nn.Conv2d(12, 12, 1, groups=3, bias=False)
        self.c2 = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.g(F.relu(self.c1(x))))
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.c2(x)


@case(
    images(3, 6),
    {"c1.weight": ([0, 1, 2, 3, 4, 8],), "c1.bias": ([0, 1, 2, 3, 4, 8],), "g.weight": ([0, 1, 2, 3, 4, 8],)},
    {"c1.weight": (6, 3, 3, 3), "c1.bias": (6,), "g.weight": (6, 3, 1, 1), "c2.weight": (4, 6, 1, 1)},
)
class ShuffleBothModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 12, 3, padding=1)
        self.g = nn.Conv2d(12, 12, 1, groups=3, bias=False)
        self.c2 = nn.Conv2d(12, 4, 1)
        self.sh = nn.ChannelShuffle(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c2(self.sh(F.relu(self.g(F.relu(self.c1(x))))))


@case(
    images(3, 6),
    {"c1.weight": ([0, 1, 2, 3],), "c1.bias": ([0, 1, 2, 3],)},
    {"c1.weight": (12, 3, 3, 3), "c1.bias": (12,), "c2.weight": (4, 3, 3, 3)},
)
class PixShuf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1)
        self.ps = nn.PixelShuffle(2)
        self.c2 = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c2(F.relu(self.ps(self.c1(x))))


@case(
    images(3, 6),
    {"c1.weight": ([0],), "c1.bias": ([0],)},
    {"c1.weight": (3, 3, 3, 3), "c1.bias": (3,), "c2.weight": (4, 12, 1, 1)},
)
class PixUnshuf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 4, 3, padding=1)
        self.ps = nn.PixelUnshuffle(2)
        self.c2 = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c2(F.relu(self.ps(self.c1(x))))


@case(
    images(3, 6),
    {"c2.weight": (ALL, [0, 1, 2, 3])},
    {"c1.weight": (8, 3, 3, 3), "c1.bias": (8,), "g.weight": (4, 4, 3, 3), "g.bias": (4,), "c2.weight": (4, 4, 1, 1)},
)
class GroupDeadCols(nn.Module):
    """consumer columns drop the first two of four groups (plus 0)"""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1)
        self.g = nn.Conv2d(16, 8, 3, groups=4)
        self.c2 = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c2(F.relu(self.g(F.relu(self.c1(x)))))


@case(
    vectors(5, 12),
    {"up.weight": ([0, 1, 8, 9],), "up.bias": ([0, 1, 8, 9],)},
    {"up.weight": (12, 12), "up.bias": (12,), "down.weight": (12, 6)},
)
class SwiGLUFused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 16)
        self.down = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.silu(a) * b)


@case(
    vectors(5, 12),
    {"up.weight": ([0, 3],), "up.bias": ([0, 3],)},
    {"up.weight": (12, 12), "up.bias": (12,), "down.weight": (12, 6)},
)
class GLUval(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 16)
        self.down = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.up(x), -1))


@case(
    vectors(12),
    {"f.weight": ([0, 4, 5],), "f.bias": ([0, 4, 5],)},
    {"f.weight": (9, 12), "f.bias": (9,), "a.weight": (2, 2), "b.weight": (2, 3)},
)
class UnequalSplit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(12, 12)
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(5, 2)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.f(x).split([3, 5, 4], 1)
        return self.a(a) + self.b(b) + self.c(c)


@case(
    vectors(5, 12),
    {"qkv.weight": ([0, 1, 2, 12, 13, 14, 24, 25, 26],), "qkv.bias": ([0, 1, 2, 12, 13, 14, 24, 25, 26],)},
    {"qkv.weight": (27, 12), "qkv.bias": (27,), "o.weight": (12, 9)},
)
class FusedQKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.o = nn.Linear(12, 12)
        self.h = 4

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.h, -1).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)
        return self.o((a @ v).transpose(1, 2).reshape(n, t, -1))


@case(
    lambda n, g: (torch.randn(n, 5, 12, generator=g), torch.randn(n, 7, 10, generator=g)),
    {
        "q.weight": ([0, 1, 2],),
        "q.bias": ([0, 1, 2],),
        "k.weight": ([0, 1, 2],),
        "k.bias": ([0, 1, 2],),
        "v.weight": ([0, 1, 2],),
        "v.bias": ([0, 1, 2],),
    },
    {
        "q.weight": (9, 12),
        "q.bias": (9,),
        "k.weight": (9, 10),
        "k.bias": (9,),
        "v.weight": (9, 10),
        "v.bias": (9,),
        "o.weight": (12, 9),
    },
)
class CrossAttn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 12)
        self.k = nn.Linear(10, 12)
        self.v = nn.Linear(10, 12)
        self.o = nn.Linear(12, 12)

    def forward(self, x, y):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 3).transpose(1, 2)
        k = self.k(y).view(n, -1, 4, 3).transpose(1, 2)
        v = self.v(y).view(n, -1, 4, 3).transpose(1, 2)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 12))


@case(
    lambda n, g: (torch.randn(n, 5, 12, generator=g), torch.randn(n, 7, 12, generator=g)),
    {"a.in_proj_weight": ([0, 1, 2, 12, 13, 14, 24, 25, 26],), "a.in_proj_bias": ([0, 1, 2, 12, 13, 14, 24, 25, 26],)},
    {"a.in_proj_weight": (27, 12), "a.in_proj_bias": (27,), "a.out_proj.weight": (12, 9)},
)
class MHACross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(12, 4, batch_first=True)

    def forward(self, x, y):
        return self.a(x, y, y)[0]


@case(
    lambda n, g: (torch.randn(n, 5, 12, generator=g), torch.randn(n, 7, 10, generator=g)),
    {
        "a.q_proj_weight": ([0, 1, 2],),
        "a.k_proj_weight": ([0, 1, 2],),
        "a.v_proj_weight": ([0, 1, 2],),
        "a.in_proj_bias": ([0, 1, 2, 12, 13, 14, 24, 25, 26],),
    },
    {},
)
class MHAKdim(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(12, 4, batch_first=True, kdim=10, vdim=10)

    def forward(self, x, y):
        return self.a(x, y, y)


def any_size(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, 8, 4 + n, 5 + n, generator=g)


@case(
    any_size,
    {"c.weight": ([0, 4],), "c.bias": ([0, 4],)},
    {"c.weight": (6, 8, 1, 1), "c.bias": (6,), "o.weight": (3, 6, 1, 1)},
)
class Shifted(nn.Module):
    """parts of the channels move in space (Lin et al., 2019): their bounds change, those in space do not"""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.o = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c(x)
        y = torch.zeros_like(h)
        y[:, :2, :-1] = h[:, :2, 1:]
        y[:, 2:4, 1:] = h[:, 2:4, :-1]
        y[:, 4:] = h[:, 4:]
        return self.o(y)


@case(
    any_size,
    {"c.weight": ([0, 1, 5],), "c.bias": ([0, 1, 5],)},
    {"c.weight": (5, 8, 1, 1), "c.bias": (5,), "o.weight": (3, 2, 1, 1), "p.weight": (3, 3, 1, 1)},
)
class SameBounds(nn.Module):
    """the channels are cut at the same numbers as space is"""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.o, self.p = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c(x)
        return self.o(h[:, :4, :4, :4]) + self.p(h[:, 4:, -4:, :4])
