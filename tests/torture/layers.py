"""Unfolding, einsum, sorting, scans, products of masked branches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import ALL, Projections, case, images, vectors


@case(
    images(4, 6),
    {"i.weight": ([0, 1],), "i.bias": ([0, 1],)},
    {"i.weight": (4, 4, 1, 1), "i.bias": (4,), "o.weight": (3, 4, 1, 1)},
)
class UnfoldFold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Conv2d(4, 6, 1)
        self.o = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.i(x))
        h, w = x.shape[2:]
        u = F.unfold(x, 3, padding=1)
        return self.o(F.fold(u * 0.5, (h, w), 3, padding=1))


@case(
    images(4, 6), {"i.weight": ([0, 1],), "i.bias": ([0, 1],)}, {"w": (3, 36), "i.weight": (4, 4, 1, 1), "i.bias": (4,)}
)
class UnfoldMatmul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Conv2d(4, 6, 1)
        self.w = nn.Parameter(torch.randn(3, 54))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.i(x))
        n, _, h, w = x.shape
        return (self.w @ F.unfold(x, 3, padding=1)).view(n, 3, h, w)


@case(vectors(5, 12), {"w": (ALL, [0, 1])}, {"w": (12, 6), "v": (3, 6)})
class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 8))
        self.v = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,od->bto", torch.relu(torch.einsum("btc,cd->btd", x, self.w)), self.v)


@case(vectors(5, 12), {"w": ([0, 1],)}, {"w": (2, 12, 3), "v": (2, 3, 5)})
class EinsumHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 12, 3))
        self.v = nn.Parameter(torch.randn(4, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bthd,hdo->bto", torch.tanh(torch.einsum("btc,hcd->bthd", x, self.w)), self.v)


@case(vectors(12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {})
class IndexSelect(nn.Module):
    """only channels 2,3,5 are read by index: reading by index pins"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 9)
        self.o = nn.Linear(3, 3)
        self.register_buffer("ix", torch.tensor([2, 3, 5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.index_select(F.relu(self.a(x)), 1, self.ix))


@case(
    vectors(12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],), "b.weight": ([0, 1],), "b.bias": ([0, 1],)},
    {"a.weight": (4, 12), "a.bias": (4,), "b.weight": (4, 12), "b.bias": (4,), "o.weight": (3, 4)},
)
class StackUnbind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 6)
        self.b = nn.Linear(12, 6)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([self.a(x), self.b(x)], 1).tanh()
        a, b = y.unbind(1)
        return self.o(a * b + y.sum(1))


@case(vectors(12), {"a.weight": ([0, 1, 4, 5],), "a.bias": ([0, 1, 4, 5],)}, {})
class RollHalf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 6)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.roll(F.relu(self.a(x)), 3, 1))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (4, 12), "a.bias": (4,), "o.weight": (3, 4)},
)
class CumsumTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 6)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.cumsum(self.a(x), 1))


@case(vectors(5, 12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {})
class CumsumChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 6)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.cumsum(self.a(x), 2))


@case(vectors(5, 12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {})
class SortChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 6)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.sort(self.a(x), 2)[0])


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (4, 12), "a.bias": (4,), "o.weight": (3, 4)},
)
class TopkTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 6)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.topk(F.relu(self.a(x)), 2, 1)[0].sum(1))


@case(vectors(5, 12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {})
class SoftmaxChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 6)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.softmax(self.a(x), -1))


@case(
    images(3, 6),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],), "b.weight": ([1, 2],), "b.bias": ([1, 2],)},
    {"a.weight": (3, 3, 1, 1), "a.bias": (3,), "b.weight": (3, 3, 1, 1), "b.bias": (3,), "o.weight": (3, 3, 1, 1)},
)
class MulTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.b = nn.Conv2d(3, 6, 1)
        self.o = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.a(x)) * torch.tanh(self.b(x)))


@case(
    vectors(5, 12),
    {"v.weight": ([0, 1, 2],), "v.bias": ([0, 1, 2],)},
    {
        "q.weight": (9, 12),
        "q.bias": (9,),
        "k.weight": (9, 12),
        "k.bias": (9,),
        "v.weight": (9, 12),
        "v.bias": (9,),
        "o.weight": (12, 9),
    },
)
class ZeroV(Projections):
    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (p(x).view(n, t, 4, 3).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 12))


class Stacked(nn.Linear):
    """Several linear layers in one, which has an axis more than its base."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight = nn.Parameter(torch.randn(count, outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,noi->bno", x, self.weight)


@case(
    vectors(6),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 6), "a.bias": (6,), "b.weight": (3, 5, 6)},
)
class StackedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = Stacked(3, 8, 5)
        self.c = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).tanh())
