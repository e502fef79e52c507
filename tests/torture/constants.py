"""Constants at borders and in branches, dtypes, outputs of every kind."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import case, images, vectors


@case(
    images(3, 8),
    {"a.weight": ([0, 1, 4],)},
    {"a.weight": (6, 3, 1, 1), "a.bias": (6,), "b.weight": (4, 6, 3, 3), "c.weight": (4, 6, 3, 3)},
)
class CarrierTwo(nn.Module):
    """constants at padded borders with dilation and stride, two consumers: one carrier stays"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 4, 3, padding=2, dilation=2)
        self.c = nn.Conv2d(8, 4, 3, stride=2, padding=1)
        self.o = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.a(x))
        return self.o(torch.cat([self.b(h).mean((2, 3)), self.c(h).mean((2, 3))], 1))


@case(images(3, 8), {"a.weight": ([0, 1, 4],)}, {"a.weight": (6, 3, 1, 1), "a.bias": (6,), "b.weight": (4, 6, 3, 3)})
class CarrierAvgPad(nn.Module):
    """count_include_pad: constants become proportional maps"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.avg_pool2d(torch.sigmoid(self.a(x)), 3, 2, 1))


@case(images(3, 8), {"a.weight": ([0, 1, 4],)}, {"a.weight": (5, 3, 1, 1), "a.bias": (5,), "b.weight": (4, 5, 3, 3)})
class AvgPad0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.avg_pool2d(torch.sigmoid(self.a(x)), 3, 2, 1, count_include_pad=False))


@case(images(3, 8), {"a.weight": ([0, 1, 4],)}, {"a.weight": (6, 3, 1, 1), "a.bias": (6,), "b.weight": (4, 6, 3, 3)})
class CarrierInterp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(
            F.interpolate(
                F.max_pool2d(torch.sigmoid(self.a(x)), 3, 2, 1), scale_factor=2, mode="bilinear", align_corners=True
            )
        )


@case(images(3, 8), {"a.weight": ([0, 1, 4],)}, {"a.weight": (5, 3, 1, 1), "a.bias": (5,), "b.weight": (4, 5, 3, 3)})
class Reflect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sigmoid(self.a(x)))


@case(
    images(3, 8),
    {"a.weight": ([0, 1, 4],)},
    {"a.weight": (5, 3, 1, 1), "a.bias": (5,), "b.weight": (4, 5, 3, 3), "b.bias": (4,)},
)
class NewBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sigmoid(self.a(x))).relu()


@case(
    vectors(12),
    {"a.weight": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5), "b.bias": (4,), "c.weight": (4, 5)},
)
class TwoConsumers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4, bias=False)
        self.c = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.a(x))
        return self.b(h) * self.c(h)


@case(
    vectors(12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],), "i.weight": ([0, 1, 4],), "i.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "i.weight": (5, 12), "i.bias": (5,), "b.weight": (4, 5)},
)
class ResConst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.i = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)
        self.register_buffer("c", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) + self.c + self.i(x))


@case(
    vectors(12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class DropTrain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.d = nn.Dropout(0.5)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.d(F.relu(self.a(x))))


class Out(NamedTuple):
    a: torch.Tensor
    b: Tensor | None


@case(
    vectors(12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return {"o": Out(self.b(F.relu(self.a(x))), None), "n": 3, "l": [x, (x * 2,)]}


@case(
    lambda n, g: {"x": torch.randn(n, 12, generator=g), "scale": 2.0, "mask": None},
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class Kwargs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x, *, scale=1.0, mask=None, **kw):
        h = F.relu(self.a(x)) * scale
        if mask is not None:
            h = h * mask
        return self.b(h)


@case(
    lambda n, g: torch.randn(n, 12, generator=g).bfloat16(),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
    tol=0.05,
    prep=lambda m: m.bfloat16(),
    rand=False,
)
class Bf16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


@case(
    lambda n, g: torch.randn(n, 12, generator=g).bfloat16(),
    {"a.weight": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
    tol=0.05,
    prep=lambda m: m.bfloat16(),
    rand=False,
)
class Bf16Const(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.sigmoid(self.a(x)))


@case(
    vectors(12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
    tol=0.02,
)
class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = F.relu(self.a(x))
        return self.b(h.float())


@case(
    images(3, 4),
    {"a.weight": ([0, 1, 4],)},
    {"a.weight": (5, 3, 1, 1), "a.bias": (5,), "b.weight": (6, 5), "b.bias": (6,)},
)
class BiasOfStrided(nn.Module):
    """a linear layer without a bias reads what is not contiguous: the new bias is an op of its own"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Linear(8, 6, bias=False)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.b(torch.sigmoid(self.a(x)).flatten(2).transpose(1, 2)))


def other_sizes(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, 8, 4 + n, 5 + n, generator=g)


class Pooled(nn.Module):
    """A unit that is one number everywhere: what pooling makes of it may depend on how many places there are."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.o = nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.pool(self.c(x).flatten(2)))

    def pool(self, h: Tensor) -> Tensor:
        raise NotImplementedError


ROWS = {"c.weight": ([0, 1],)}


@case(other_sizes, ROWS, {"c.weight": (6, 8, 1, 1), "c.bias": (6,), "o.weight": (3, 6)})
class PooledMean(Pooled):
    def pool(self, h: Tensor) -> Tensor:
        return h.mean(-1) + h.amax(-1) + h.std(-1)


@case(other_sizes, {**ROWS, "c.bias": ([0, 1],)}, {"c.weight": (6, 8, 1, 1), "c.bias": (6,), "o.weight": (3, 6)})
class PooledZeros(Pooled):
    def pool(self, h: Tensor) -> Tensor:
        return h.sum(-1) + h.norm(dim=-1) + h.cumsum(-1)[..., -1] + (h @ h.mT).sum(-1)


@case(other_sizes, ROWS, {})
class PooledSum(Pooled):
    def pool(self, h: Tensor) -> Tensor:
        return h.sum(-1)


@case(other_sizes, ROWS, {})
class PooledNorm(Pooled):
    def pool(self, h: Tensor) -> Tensor:
        return h.norm(dim=-1)


@case(other_sizes, ROWS, {})
class PooledScan(Pooled):
    def pool(self, h: Tensor) -> Tensor:
        return h.cumsum(-1)[..., -1]


@case(other_sizes, ROWS, {})
class PooledShares(Pooled):
    def pool(self, h: Tensor) -> Tensor:
        return h.softmax(-1).amax(-1)


@case(other_sizes, ROWS, {})
class PooledProduct(Pooled):
    def pool(self, h: Tensor) -> Tensor:
        return torch.einsum("bct,bct->bc", h, h)


@case(
    images(3, 13),
    {"a.weight": ([0, 1],), "e.weight": (slice(0, 6),)},
    {"d": (3, 1, 1), "a.weight": (3, 3, 1, 1), "a.bias": (3,), "c.weight": (4, 11, 1, 1)},
)
class UniformIsNoCarrier(nn.Module):
    """What varies towards the borders has no stand-in among constants that are uniform up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.p = nn.AvgPool2d(3, 1, padding=1)
        self.d = nn.Parameter(torch.randn(4, 1, 1))
        self.e = nn.Conv2d(3, 8, 1)
        self.c = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        e = torch.sigmoid(self.e(x))
        return self.c(torch.cat([self.p(self.a(x)) + self.d, e], 1)), e
