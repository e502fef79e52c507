"""Values that ``forward`` makes of sizes: a smaller model must not compute with smaller numbers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import CASES, Case, case, vectors

ROWS = {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}
LEFT = {"a.weight": (6, 6), "a.bias": (6,), "b.weight": (3, 6)}


class Hidden(nn.Module):
    """What happens between two layers of eight units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.change(self.a(x)))

    def change(self, h: Tensor) -> Tensor:
        raise NotImplementedError


@case(vectors(6), ROWS, LEFT)
class FilledLike(Hidden):
    def change(self, h: Tensor) -> Tensor:
        return h * torch.full_like(h, 1.0 / h.shape[1])


@case(vectors(6), ROWS, LEFT)
class FilledNew(Hidden):
    def change(self, h: Tensor) -> Tensor:
        return h * h.new_full((1, 1), h.shape[1])


@case(vectors(6), ROWS, LEFT)
class FilledInPlace(Hidden):
    def change(self, h: Tensor) -> Tensor:
        return h * torch.zeros(1).fill_(h.shape[1])


@case(vectors(6), ROWS, LEFT)
class FilledScalar(Hidden):
    def change(self, h: Tensor) -> Tensor:
        return h / torch.full((), float(h.shape[-1])).sqrt()


@case(vectors(6), ROWS, LEFT)
class SquareRoot(Hidden):
    """as attention is scaled in papers' code"""

    def change(self, h: Tensor) -> Tensor:
        return h / torch.sqrt(torch.tensor(h.shape[-1], dtype=torch.float32))


@case(vectors(6), ROWS, LEFT)
class Alpha(Hidden):
    def change(self, h: Tensor) -> Tensor:
        return torch.add(h, h.sin(), alpha=1 / h.shape[1])


@case(vectors(6), ROWS, LEFT)
class PlacesAsList(Hidden):
    """a number for each unit, made anew in every call"""

    def change(self, h: Tensor) -> Tensor:
        return h * torch.tensor([i + 0.5 for i in range(h.shape[-1])])


class Slopes(nn.Module):
    """ALiBi (Press et al., 2022): a slope for each head, by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 4, 4
        self.qkv, self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (one(x).view(b, t, self.heads, self.dim).transpose(1, 2) for one in self.qkv)
        slopes = torch.tensor([2.0 ** -(i + 1) for i in range(self.heads)])
        far = torch.arange(t)[None] - torch.arange(t)[:, None]
        weights = (q @ k.transpose(-1, -2) * self.dim**-0.5 + slopes[:, None, None] * far).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, self.heads * self.dim))


CASES["SlopesOfHeads"] = Case(
    Slopes,
    vectors(5, 16),
    {"out.weight": (slice(None), slice(4, 8))},
    {
        **{f"qkv.{i}.weight": (12, 16) for i in range(3)},
        **{f"qkv.{i}.bias": (12,) for i in range(3)},
        "out.weight": (16, 12),
    },
)


@case(vectors(6), ROWS, LEFT)
class FilledByName(Hidden):
    def change(self, h: Tensor) -> Tensor:
        return h * torch.full((1,), fill_value=1 / h.shape[1])


# A table of numbers that forward makes, or finds: it cannot shrink, and is cut where it is read.
NUMBERS = np.linspace(0.5, 2.0, 8, dtype=np.float32)


@case(vectors(6), ROWS, LEFT)
class TableOfPlaces(Hidden):
    def change(self, h: Tensor) -> Tensor:
        return (h + torch.arange(8, device=h.device)) * torch.arange(h.shape[-1])


@case(vectors(6), ROWS, LEFT)
class TableOfPowers(Hidden):
    """as positions and frequencies are encoded"""

    def change(self, h: Tensor) -> Tensor:
        return h * 100.0 ** -(torch.arange(0, 16, 2) / 16)


@case(vectors(6), ROWS, LEFT)
class TableTurned(Hidden):
    """along another axis than the last"""

    def change(self, h: Tensor) -> Tensor:
        return (h[..., None] * torch.linspace(0.1, 1.0, 8)[:, None]).squeeze(-1)


@case(vectors(6), ROWS, LEFT)
class TableRepeated(Hidden):
    def change(self, h: Tensor) -> Tensor:
        return torch.lerp(h, h.sin(), torch.tensor([0.1, 0.2]).repeat(4))


@case(vectors(6), ROWS, LEFT)
class TableFilled(Hidden):
    def change(self, h: Tensor) -> Tensor:
        return h * torch.full((1, 8), 0.5, device=h.device) + h.new_full((len(h), 8), fill_value=0.1)


@case(vectors(6), ROWS, LEFT)
class TableOfZeros(Hidden):
    def change(self, h: Tensor) -> Tensor:
        return torch.cat([h, torch.zeros(len(h), 8, device=h.device)])[: len(h)]


@case(vectors(6), ROWS, LEFT)
class TableWritten(Hidden):
    def change(self, h: Tensor) -> Tensor:
        weights = torch.zeros(8)
        weights[:4] = 2.0
        return h * (weights - 0.5)


@case(vectors(6), ROWS, LEFT)
class TableMasks(Hidden):
    def change(self, h: Tensor) -> Tensor:
        return h.masked_fill(torch.arange(8) < 2, 0.5)


@case(vectors(6), ROWS, LEFT)
class TableOfNumpy(Hidden):
    """of the module that the code stands in"""

    def change(self, h: Tensor) -> Tensor:
        return h + torch.from_numpy(NUMBERS)


class Chosen(Hidden):
    """By its size ``forward`` chooses what it computes: nothing can leave, and nothing may go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(8, 3)
        self.shifts = nn.ParameterList(nn.Parameter(torch.randn(3)) for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(self.a(x))

    def choose(self, h: Tensor) -> Tensor:
        raise NotImplementedError


@case(vectors(6), ROWS, {})
class ChosenLayer(Chosen):
    def choose(self, h: Tensor) -> Tensor:
        return (self.b if h.shape[1] > 7 else self.c)(h)


@case(vectors(6), ROWS, {})
class ChosenParameter(Chosen):
    def choose(self, h: Tensor) -> Tensor:
        return self.b(h) + self.shifts[h.shape[1]]


@case(vectors(6), ROWS, {})
class ChosenValue(Chosen):
    def choose(self, h: Tensor) -> Tensor:
        one, other = self.b(h), self.c(h)
        return (one if h.shape[1] > 7 else other).tanh() + one * other


@case(vectors(9, 6), ROWS, {})
class ChosenDiagonal(Chosen):
    def choose(self, h: Tensor) -> Tensor:
        return self.b((h @ h.mT).triu(h.shape[2] - 7) @ h)


@case(vectors(9, 6), ROWS, {})
class ChosenStep(Chosen):
    def choose(self, h: Tensor) -> Tensor:
        return self.b(h[:, h.shape[2]])


@case(vectors(9, 6), ROWS, {})
class ChosenWindow(Chosen):
    def choose(self, h: Tensor) -> Tensor:
        k = h.shape[2] // 4
        return self.b(torch.max_pool1d(h.mT, 2 * k + 1, 1, k).mT)


@case(
    vectors(6),
    {"a.weight": ([0, 3],), "a.bias": ([0, 3],)},
    {"a.weight": (7, 6), "a.bias": (7,), "b.weight": (3, 7)},
)
class UnitByNumber(Hidden):
    """a unit that is read by its number, so that none before it may leave"""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h) + h[:, 2, None]


@case(vectors(6), ROWS, LEFT)
class ListedSetting(Hidden):
    """one of a config's list of sizes, as backbones keep the widths of their stages"""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(widths=[16, 8])

    def change(self, h: Tensor) -> Tensor:
        return h.reshape(len(h), -1, self.config.widths[-1]).mean(1)


@case(vectors(6), {"re.weight": ([0, 2],), "im.weight": ([0, 1],)}, {}, batches=(2, 1, 3))
class ComplexConstant(nn.Module):
    """a constant that is a complex number has no carrier"""

    def __init__(self) -> None:
        super().__init__()
        self.re, self.im, self.o = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(5, 3)
        self.turn = nn.Parameter(torch.randn(4, 5, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.o((torch.complex(self.re(x), self.im(x)) @ self.turn).abs())


@case(
    vectors(6),
    {"a.weight": ([0, 1, 5],), "a.bias": ([0, 1, 5],)},
    {
        "a.weight": (5, 6),
        "a.bias": (5,),
        "b.weight": (4, 3),
        "c.weight": (4, 2),
        "d.weight": (4, 3),
        "e.weight": (4, 1),
    },
)
class SlicesAtNumbers(nn.Module):
    """Bounds from the start, from the end, on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b, self.c, self.d, self.e = nn.Linear(5, 4), nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        parts = self.b(h[:, :5]), self.c(h[:, 5:]), self.d(h[..., -4:]), self.e(h[0:, 1:3])
        return torch.stack(parts).sum(0)


@case(
    vectors(6),
    {"a.weight": ([0, 1, 5],), "a.bias": ([0, 1, 5],)},
    {"a.weight": (5, 6), "a.bias": (5,), "b.weight": (4, 7)},
)
class WrittenBetweenNumbers(nn.Module):
    """What is made, and where it is written, holds numbers; the columns where nothing is written leave as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(len(x), 12)
        y[:, 2:10] = self.a(x)
        y[:, :2] = x[:, :2]
        return self.b(y)


@case(
    vectors(6),
    {"a.weight": ([0, 1, 5],), "a.bias": ([0, 1, 5],)},
    {"a.weight": (5, 6), "a.bias": (5,), "b.weight": (4, 5)},
)
class NothingBesides(nn.Module):
    """What is written to a part, and turned round there, is all that is left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(*x.shape[:-1], 12)
        y[..., 2:10] = self.a(x).flip(-1)
        return self.b(y)


@case(
    vectors(6),
    {"a.weight": ([0, 1, 5],), "a.bias": ([0, 1, 5],)},
    {"a.weight": (5, 6), "a.bias": (5,), "w": (4, 5)},
)
class PartsOfAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(6, 8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return F.linear(h[:, :5], self.w[:, :5]) + h[:, 5:] @ self.w[:, 5:].T


@case(
    vectors(5, 6),
    {"a.weight": ([0, 1, 4, 6, 7],), "a.bias": ([0, 1, 4, 6, 7],)},
    {"a.weight": (4, 6), "a.bias": (4,), "b.weight": (4, 4)},
)
class TurnsInterleaved(nn.Module):
    """Neighbours are rotated together: a pair of units stays or leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        angle = torch.arange(5)[:, None] * 0.3
        even, odd = h[..., ::2], h[..., 1::2]
        turned = torch.empty_like(h)
        turned[..., ::2] = even * angle.cos() - odd * angle.sin()
        turned[..., 1::2] = odd * angle.cos() + even * angle.sin()
        return self.b(turned)
