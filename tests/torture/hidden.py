"""Products of activations, grouped and flattened axes, hooks, checkpoints and scripts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import ALL, case, images, tokens, vectors


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class Gram(nn.Module):
    """activation times activation"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return (self.b(h), h @ h.transpose(1, 2))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],), "b.weight": ([0, 1, 4],), "b.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (5, 12), "b.bias": (5,)},
)
class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.cosine_similarity(self.a(x), self.b(x), dim=-1)


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],), "b.weight": ([0, 1, 4],), "b.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (5, 12), "b.bias": (5,)},
)
class Normalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.a(x), dim=-1) @ F.normalize(self.b(x), dim=-1).transpose(1, 2)


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class FftTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.fft.fft(self.a(x), dim=1).real)


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"w": (5,), "a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class FftFilter(nn.Module):
    """global filter: complex parameter over channels"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)
        self.w = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft(self.a(x), dim=1, norm="ortho")
        f = f * torch.complex(self.w, self.w)
        return self.b(torch.fft.irfft(f, n=x.shape[1], dim=1, norm="ortho"))


@case(
    images(3, 8),
    {"a.weight": ([0, 5, 11],), "a.bias": ([0, 5, 11],)},
    {"a.weight": (9, 3, 3, 3), "a.bias": (9,), "b.weight": (12, 3, 1, 1)},
)
class GroupedUneven(nn.Module):
    """3 groups of 4 inputs; one dead of each"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3)
        self.b = nn.Conv2d(12, 12, 1, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


@case(
    images(3, 8),
    {"a.weight": ([0, 1, 2],), "a.bias": ([0, 1, 2],), "b.bias": ([0, 1, 2, 3, 4, 5],)},
    {"a.weight": (5, 3, 3, 3), "a.bias": (5,), "b.weight": (10, 1, 3, 3), "b.bias": (10,), "c.weight": (4, 10, 1, 1)},
)
class DepthMult(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 16, 3, groups=8)
        self.c = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@case(
    images(3, 8),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 3, 1, 1), "a.bias": (6,), "fc.weight": (4, 24)},
)
class FlattenSpace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.a(x)), 2), 1))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 2, 4],), "a.bias": ([0, 2, 4],)},
    {"a.weight": (2, 12), "a.bias": (2,), "b.weight": (3, 1)},
)
class Strided(nn.Module):
    """With each unit goes the one behind it, which nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))[..., ::2])


@case(
    vectors(5, 12),
    {"a.weight": ([0, 3],), "a.bias": ([0, 3],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (3, 2), "c.weight": (3, 2)},
)
class SplitRemainder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 7)
        self.b = nn.Linear(3, 3)
        self.c = nn.Linear(3, 3)
        self.d = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        p = F.relu(self.a(x)).split(3, -1)
        return self.b(p[0]) + self.c(p[1]) + self.d(p[2])


@case(
    vectors(12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)}
)
class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)
        self.a.register_forward_hook(hk)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def hk(m, i, o):
    return F.relu(o) * 2


@case(
    vectors(12), {"0.weight": ([0, 1],), "0.bias": ([0, 1],)}, {"0.weight": (6, 12), "0.bias": (6,), "2.weight": (3, 6)}
)
class Seq(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


@case(vectors(12), {"weight": ([0, 1],)}, {})
class Leaf(nn.Linear):
    def __init__(self) -> None:
        super().__init__(12, 8)


@case(
    vectors(12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)}
)
class InFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).view(-1, self.b.in_features))


@case(
    vectors(12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)}
)
class Ckpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)

    def f(self, x):
        return F.relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return self.b(checkpoint(self.f, x, use_reentrant=False))


@torch.jit.script
def swish(x):
    return x * torch.sigmoid(x)


@case(
    vectors(12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)}
)
class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(swish(self.a(x)))


@case(
    tokens(30, 6),
    {"head.weight": (ALL, [0, 1]), "p": (ALL, [0, 1]), "l.weight": ([0, 1],), "l.bias": ([0, 1],)},
    {"p": (6, 6), "e.weight": (30, 6), "l.weight": (6, 6), "l.bias": (6,)},
)
class TiedNamed(nn.Module):
    """tied head under an alias; mask at the embedding"""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(30, 8)
        self.p = nn.Parameter(torch.randn(6, 8))
        self.l = nn.Linear(8, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.e.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.l(F.relu(self.e(x) + self.p)))


@case(
    vectors(4, 5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (3, 6)},
)
class Conv1dLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        n, t, p, c = h.shape
        h = h.permute(0, 3, 1, 2).reshape(n * c, t, p).mean(2).view(n, c, t).transpose(1, 2)
        return self.b(h)


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class EmptyMemory(nn.Module):
    """What is joined holds nothing yet, but has the width of what it is joined with."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        memory = x.new_zeros((len(x), 0, self.width)).unsqueeze(1)
        return self.b(torch.cat([memory, F.relu(self.a(x)).unsqueeze(1)], 2).squeeze(1))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class NothingIsPassedOn(nn.Module):
    """A part of the units is turned and the rest passed on, as rotary embeddings do; here the part is all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = 8
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.cat([F.relu(h[..., : self.turned]), h[..., self.turned :]], -1))


class Folds(nn.Module):
    """Fails on fewer units until its attribute follows, which is a number, too."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 8
        self.lin = nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).view(-1, 2, self.size).sum(1) * self.size**-0.5


@case(
    vectors(6),
    {
        "a.weight": ([0, 1, 5],), "a.bias": ([0, 1, 5],),
        "fold.lin.weight": ([0, 1, 9, 8],), "fold.lin.bias": ([0, 1, 9, 8],),
    },
    {
        "a.weight": (5, 6), "a.bias": (5,), "out.weight": (3, 9),
        "fold.lin.weight": (12, 6), "fold.lin.bias": (12,), "end.weight": (3, 6),
    },
)  # fmt: skip
class WrittenAndReadLate(nn.Module):
    """When the child fails, nothing has read what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = 8
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 4)
        self.fold = Folds()
        self.out, self.end = nn.Linear(12, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.wide + 4)
        y[:, : self.wide].copy_(self.a(x))
        y[:, self.wide :].copy_(self.b(x))
        return self.end(self.fold(x)) + self.out(y.relu())
