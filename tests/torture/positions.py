"""Positions: indices, resampling, class tokens, convolutions in one and three dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import ALL, case, images, vectors


@case(vectors(12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {})
class Argmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.e = nn.Embedding(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.e(self.a(x).argmax(1))


@case(vectors(12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {})
class OneHot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.one_hot(self.a(x).argmax(1), 8).float())


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)},
)
class BoolIndex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        m = torch.ones(h.shape[1], dtype=torch.bool)
        m[0] = False
        return self.b(h[:, m])


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)},
)
class ScatterAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)
        self.register_buffer("ix", torch.tensor([0, 1, 0, 1, 2]))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        out = torch.zeros(h.shape[0], 3, h.shape[2]).index_add(1, self.ix, h)
        return self.b(out)


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)},
)
class ScatterAdd2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)
        self.register_buffer("ix", torch.tensor([0, 1, 0, 1, 2]))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        ix = self.ix[None, :, None].expand(h.shape[0], -1, h.shape[2])
        return self.b(torch.zeros(h.shape[0], 3, h.shape[2]).scatter_add(1, ix, h))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)},
)
class TakeAlong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        ix = x[:, :, 0].argsort(1)
        return self.b(torch.take_along_dim(h, ix[:, :, None], 1))


@case(
    images(3, 8),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 3, 1, 1), "a.bias": (6,), "b.weight": (3, 6, 1, 1)},
)
class GridSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        g = F.affine_grid(
            torch.tensor([[[0.9, 0.1, 0], [0, 1, 0.1]]]).expand(x.shape[0], -1, -1), h.shape, align_corners=False
        )
        return self.b(F.grid_sample(h, g, align_corners=False))


@case(
    images(3, 8),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 3, 1, 1), "a.bias": (6,), "b.weight": (3, 6, 1, 1)},
)
class PoolIdx(nn.Module):
    """max pool with indices and unpool"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, ix = F.max_pool2d(F.relu(self.a(x)), 2, return_indices=True)
        return self.b(F.max_unpool2d(h, ix, 2))


@case(
    images(3, 8),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 3, 1, 1), "a.bias": (6,), "b.weight": (3, 6, 1, 1)},
)
class LpPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.lp_pool2d(F.relu(self.a(x)), 2, 2))


@case(images(3, 8), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {})
class AvgOverC(nn.Module):
    """spatial attention: mean and max over channels as in CBAM"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 3, 1)
        self.sp = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        m = torch.cat([h.mean(1, keepdim=True), h.amax(1, keepdim=True)], 1)
        return self.b(h * torch.sigmoid(self.sp(m)))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],), "p": (ALL, ALL, [0, 1])},
    {"p": (1, 1, 6), "a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)},
)
class ClsToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)
        self.p = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.p.expand(x.shape[0], -1, -1), F.relu(self.a(x))], 1)
        return self.b(h)


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],), "pos": (ALL, ALL, [0, 1])},
    {"pos": (1, 5, 6), "a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)},
)
class PosEmb(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)
        self.pos = nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) + self.pos).tanh())


@case(vectors(5, 12), {"a.weight": ([0, 1],)}, {})
class PosEmbConst(nn.Module):
    """constants that differ at each position (bias + pos): cannot be one bias"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)
        self.pos = nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) + self.pos).tanh())


@case(
    lambda n, g: torch.randn(n, 3, 8, 8, 8, generator=g),
    {"a.weight": ([0, 1],)},
    {"a.weight": (7, 3, 1, 1, 1), "a.bias": (7,), "b.weight": (4, 7, 3, 3, 3)},
)
class Conv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv3d(3, 8, 1)
        self.b = nn.Conv3d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sigmoid(self.a(x))).mean((2, 3, 4))


@case(
    lambda n, g: torch.randn(n, 3, 9, generator=g),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],), "b.weight": ([0, 1],)},
    {
        "a.weight": (6, 3, 3),
        "a.bias": (6,),
        "b.weight": (6, 2, 3),
        "n.weight": (6,),
        "n.bias": (6,),
        "c.weight": (4, 6, 1),
    },
)
class Conv1dGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 8, 3)
        self.b = nn.Conv1d(8, 8, 3, groups=4, bias=False)
        self.n = nn.BatchNorm1d(8)
        self.c = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.n(self.b(torch.sigmoid(self.a(x))))))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)},
)
class PromptMask(nn.Module):
    """A mask of which the part before the input, a prompt's, is known."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        prompt = torch.ones(x.shape[0], 2, dtype=torch.bool)
        seen = torch.cat([prompt, x[:, :, 0] > 0], 1)
        seen = seen[:, :, None] & seen[:, None]
        return self.b(seen[:, 2:, 2:].float() @ F.relu(self.a(x)))


@case(
    lambda n, g: torch.randn(n, 12 if n == 3 else 5, 12, generator=g),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],), "c.weight": ([0, 4],), "c.bias": ([0, 4],)},
    {"a.weight": (7, 12), "a.bias": (7,), "c.weight": (7, 12), "c.bias": (7,), "b.weight": (4, 7)},
)
class WholeWindows(nn.Module):
    """The dummy input fills no window: what is made of windows is empty, but not for inputs that are longer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.c = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.a(x)[:, : x.shape[1] // 8 * 8]
        return self.b(F.relu(torch.cat([windows, self.c(x)], 1)))


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.proj = nn.Linear(12, 48), nn.Linear(16, 12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


@case(
    vectors(5, 12),
    {"one.proj.weight": (ALL, slice(0, 8))},
    {"one.qkv.weight": (24, 12), "one.qkv.bias": (24,), "one.proj.weight": (12, 8)},
)
class SlopesInACall(nn.Module):
    """A table for the heads of all layers, which a fused call adds: each takes what it kept."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Biased(), Biased()

    def forward(self, x: Tensor) -> Tensor:
        slopes = 2.0 ** -torch.arange(1.0, 5.0).view(1, 4, 1, 1)
        bias = slopes * torch.arange(x.shape[1]).view(1, 1, 1, -1)
        x = x + self.one(x, bias)
        return x + self.two(x, bias)
