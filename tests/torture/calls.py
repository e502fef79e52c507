"""One layer called several times: what a unit leaves behind has to be the same in every call."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import Inputs, case, images, vectors


def pairs(size: int) -> Inputs:
    return lambda n, g: (torch.randn(n, size, generator=g), torch.randn(n, size, generator=g))


@case(
    pairs(6), {"tower.0.weight": ([0, 1],)}, {"tower.0.weight": (6, 6), "tower.0.bias": (6,), "tower.2.weight": (5, 6)}
)
class Siamese(nn.Module):
    """the constants go to the one bias, once"""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(self.tower(a), self.tower(b))


@case(
    images(3, 16),
    {"head.0.weight": ([0, 1],)},
    {"head.0.weight": (5, 3, 3, 3), "head.0.bias": (5,), "head.2.weight": (4, 5, 3, 3)},
)
class Levels(nn.Module):
    """a detection head over scales: padded, so that one unit carries the constants of both, at every scale"""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(F.avg_pool2d(x, k)) for k in (1, 2, 4)]


@case(
    images(3, 16),
    {"head.0.weight": ([0, 1],)},
    {"head.0.weight": (4, 3, 3, 3), "head.0.bias": (4,), "head.2.weight": (4, 4, 3, 3), "head.2.bias": (4,)},
)
class NormAtEachLevel(nn.Module):
    """as in EfficientDet (Tan et al., 2020): the norms differ, so the convolution gets a bias"""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [norm(self.head(F.avg_pool2d(x, k))) for norm, k in zip(self.norms, (1, 2), strict=True)]


@case(
    pairs(6),
    {"a.weight": ([0, 1],), "a.bias": ([0],)},
    {"a.weight": (7, 6), "a.bias": (7,), "b.weight": (3, 7)},
)
class OtherConstants(nn.Module):
    """unit 0 is zero in both calls; unit 1 is a number in each, but not the same"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(self.a(x).sin()) + self.b(self.a(y).tanh())


@case(pairs(6), {"a.weight": ([0, 1],), "c.weight": ([0, 1],), "c.bias": ([0, 1],)}, {})
class ZeroInOneCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(self.a(x).exp()) + self.b(self.c(y).relu())


@case(vectors(6), {"a.weight": ([2],)}, {})
class ForthAndBack(nn.Module):
    """a square weight is used as it is and transposed: no column of it can take the constant"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).sigmoid()
        return self.b(h) + F.linear(h, self.b.weight.t(), self.b.bias)


class Cache:
    """What a layer is handed to keep its keys in: neither a tensor nor plain."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def update(self, keys: Tensor) -> Tensor:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 1)
        return self.keys


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 12)
        self.head_size = 6

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        q, k = (f(x).view(len(x), -1, 2, self.head_size).transpose(1, 2) for f in (self.q, self.k))
        return (q / math.sqrt(self.head_size)) @ cache.update(k).transpose(2, 3)


_DIMS = [0, 2, 6, 8]


@case(
    vectors(5, 12),
    {"a.q.weight": (_DIMS,), "a.q.bias": (_DIMS,), "a.k.weight": (_DIMS,), "a.k.bias": (_DIMS,)},
    {"a.q.weight": (8, 12), "a.q.bias": (8,), "a.k.weight": (8, 12), "a.k.bias": (8,)},
)
class ReadsAndCaches(nn.Module):
    """the cache is as it was at the call, though only real inputs can say which branch is taken"""

    def __init__(self) -> None:
        super().__init__()
        self.a = Scored()

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max().item() > 1e6:
            return x
        return self.a(x, Cache()).softmax(-1)
