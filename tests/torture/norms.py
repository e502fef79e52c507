"""Norms without parameters, groups whose inputs are dead, residual chains, odd batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import Projections, case, images, vectors


@case(
    images(3, 6),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 3, 1, 1), "a.bias": (6,), "b.weight": (4, 6, 1, 1)},
)
class InPlain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.n = nn.InstanceNorm2d(8)
        self.b = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x))))


# two of four groups leave, and of a third only one channel of two could
two_groups = case(
    images(3, 6),
    {"a.weight": ([0, 1, 4, 5, 6],), "a.bias": ([0, 1, 4, 5, 6],)},
    {"a.weight": (4, 3, 1, 1), "a.bias": (4,), "b.weight": (4, 4, 1, 1)},
)


@two_groups
class GroupsPlain(nn.Module):
    """two of four groups leave, and no tensor of the norm shows how many there are"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.n = nn.GroupNorm(4, 8, affine=False)
        self.b = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x))))


@two_groups
class GroupsCalled(nn.Module):
    """the number of groups stands in the code"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(F.group_norm(self.a(x), 4)))


@case(
    images(3, 6),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 3, 1, 1), "a.bias": (6,), "b.weight": (4, 6, 1, 1)},
)
class BnPlain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.n = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
        self.b = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x))))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (4, 6)},
)
class UnflattenMod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.u = nn.Unflatten(2, (8, 1))
        self.f = nn.Flatten(2)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(F.relu(self.u(self.a(x)))))


@case(images(8, 6), {"d.weight": ([0, 1, 2, 3],), "d.bias": ([0, 1, 2, 3],)}, {})
class GroupedRowsOnly(nn.Module):
    """whole group's rows of a grouped conv that reads the input"""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Conv2d(8, 16, 3, groups=4)
        self.b = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.d(x)))


@case(
    images(8, 6),
    {"i.weight": ([0, 1],), "i.bias": ([0, 1],)},
    {"i.weight": (6, 8, 1, 1), "i.bias": (6,), "d.weight": (12, 2, 3, 3), "d.bias": (12,), "b.weight": (4, 12, 1, 1)},
)
class GroupedInputDead(nn.Module):
    """the inputs of group 0 are dead: its outputs are its biases"""

    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Conv2d(8, 8, 1)
        self.d = nn.Conv2d(8, 16, 3, groups=4)
        self.b = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.d(F.relu(self.i(x)))))


@case(
    images(8, 6),
    {"i.weight": ([0, 1],), "i.bias": ([0, 1],)},
    {
        "i.weight": (6, 8, 1, 1),
        "i.bias": (6,),
        "d.weight": (6, 1, 3, 3),
        "d.bias": (6,),
        "n.weight": (6,),
        "n.bias": (6,),
        "b.weight": (4, 6, 1, 1),
    },
)
class DepthwiseInputDead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Conv2d(8, 8, 1)
        self.d = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.n = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.d(F.relu(self.i(x))))))


@case(images(3, 6), {"a.weight": ([0, 1],)}, {"a.weight": (6, 3, 1, 1), "a.bias": (6,), "b.weight": (4, 6, 1, 1)})
class TrainBn(nn.Module):
    """constants before a batch norm in train mode"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 4, 1, bias=False)
        self.n = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.b(torch.sigmoid(self.a(x))))


class Sub(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.l = nn.Linear(w, w)
        self.w = w

    def forward(self, x, k):
        return F.relu(self.l(x)) * k


@case(
    vectors(12),
    {
        "i.weight": ([0, 1],),
        "i.bias": ([0, 1],),
        "s1.l.weight": ([0, 1],),
        "s1.l.bias": ([0, 1],),
        "s2.l.weight": ([0, 1],),
        "s2.l.bias": ([0, 1],),
    },
    {
        "i.weight": (6, 12),
        "i.bias": (6,),
        "s1.l.weight": (6, 6),
        "s1.l.bias": (6,),
        "s2.l.weight": (6, 6),
        "s2.l.bias": (6,),
        "b.weight": (4, 6),
    },
)
class Residuals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Linear(12, 8)
        self.s1 = Sub(8)
        self.s2 = Sub(8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        h = h + self.s1(h, 2.0)
        h = h + self.s2(h, k=h.new_tensor(0.5))
        return self.b(h)


@case(
    vectors(12),
    {"i.weight": ([0, 1],), "i.bias": ([0, 1],)},
    {"i.weight": (6, 12), "i.bias": (6,), "b.weight": (4, 6)},
    batches=(2,),
)
class BatchOne(nn.Module):
    """squeezes a batch"""

    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.b(F.relu(self.i(x[k]))) for k in range(2)])


@case(
    lambda n, g: torch.randn(1, 12, generator=g),
    {"i.weight": ([0, 1],), "i.bias": ([0, 1],)},
    {"i.weight": (6, 12), "i.bias": (6,), "b.weight": (4, 6)},
)
class BatchSqueeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.i(x.squeeze(0))))


@case(
    vectors(5, 12),
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
        "k.weight": (9, 12),
        "k.bias": (9,),
        "v.weight": (9, 12),
        "v.bias": (9,),
        "o.weight": (12, 9),
    },
)
class BatchTimesHeads(Projections):
    """b * 4 in forward"""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, 4, 3).transpose(1, 2).reshape(b * 4, t, 3) for p in (self.q, self.k, self.v))
        y = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.5).softmax(-1), v)
        return self.o(y.view(b, 4, t, 3).transpose(1, 2).reshape(b, t, 12))


@case(
    vectors(5, 12),
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
        "k.weight": (9, 12),
        "k.bias": (9,),
        "v.weight": (9, 12),
        "v.bias": (9,),
        "o.weight": (12, 9),
    },
)
class BatchTimesAttr(Projections):
    def __init__(self) -> None:
        super().__init__()
        self.h = 4

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        d = c // self.h
        q, k, v = (
            p(x).view(b, t, self.h, d).transpose(1, 2).reshape(b * self.h, t, d) for p in (self.q, self.k, self.v)
        )
        y = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.5).softmax(-1), v)
        return self.o(y.view(b, self.h, t, d).transpose(1, 2).reshape(b, t, c))


@case(
    vectors(5, 12),
    {"q.weight": ([0, 1, 2],), "q.bias": ([0, 1, 2],)},
    {"q.weight": (9, 12), "q.bias": (9,), "o.weight": (12, 9)},
)
class FlatLit(nn.Module):
    """x.view(b * t, 12)"""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 12)
        self.o = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        return self.o(F.relu(self.q(x).view(b * t, 12))).view(b, t, 12)


@case(
    vectors(5, 12),
    {"q.weight": ([0, 1, 2],), "q.bias": ([0, 1, 2],)},
    {"q.weight": (9, 12), "q.bias": (9,), "o.weight": (12, 9)},
)
class FlatProd(nn.Module):
    """x.view(b, t * 12)"""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 12)
        self.o = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        return self.o(F.relu(self.q(x).view(b * t * 12)).view(b, t, -1))


@case(vectors(5, 12), {"q.weight": ([0, 1, 2],), "q.bias": ([0, 1, 2],)}, {})
class SumShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 12)
        self.o = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.q(x)
        return self.o(h * sum(h.shape))


class OfSquares(nn.Module):
    """Its ``eps`` follows by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 0.1

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@case(
    vectors(5, 6),
    {"a.weight": ([0, 1, 5],), "a.bias": ([0, 1, 5],)},
    {"a.weight": (5, 6), "a.bias": (5,), "norm.weight": (5,), "b.weight": (4, 5)},
)
class ALiteralAroundANorm(nn.Module):
    """The number that changes in the child is no fault of the one that is written here."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), OfSquares(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).view(-1, 8)
        return self.b(self.norm(h).view(len(x), -1, 8))


class OwnAffine(nn.LayerNorm):
    """Normalises the last axis alone, and has a weight for each head, too."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__((heads, size))
        self.normalized_shape = (size,)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape) * self.weight + self.bias


@case(
    vectors(6),
    {"a.weight": ([0, 1, 2, 3],), "a.bias": ([0, 1, 2, 3],), "n.weight": ([0],), "n.bias": ([0],)},
    {"a.weight": (8, 6), "a.bias": (8,), "n.weight": (2, 4), "n.bias": (2, 4), "b.weight": (5, 8)},
)
class AffineByHeads(nn.Module):
    """what a subclass means by an attribute of its base is no function of its tensors"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.n = OwnAffine(3, 4)
        self.b = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.n(self.a(x).view(-1, 3, 4))
        return self.b(heads.flatten(1).tanh())
