"""What Python does between the layers: writes, loops, branches, attributes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import ALL, case, images, vectors


@case(vectors(12), {"a.weight": ([0, 1, 4],)}, {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)}, tol=0.02)
class AutocastAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.b(F.sigmoid(self.a(x)))


@case(
    vectors(12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8).double()
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x.double())).float())


@case(
    images(3, 6),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 3, 3, 3), "a.bias": (5,), "b.weight": (4, 5, 3, 3)},
    prep=lambda m: m.to(memory_format=torch.channels_last),
)
class ChLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x.contiguous(memory_format=torch.channels_last))))


@case(
    images(3, 6),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 3, 3, 3), "a.bias": (5,), "b.weight": (4, 5)},
    prep=lambda m: m.to(memory_format=torch.channels_last),
)
class ChLastPooled(nn.Module):
    """Pooling to 1 x 1 strides its result anew, where channels are last."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x.contiguous(memory_format=torch.channels_last)))
        return self.b(F.adaptive_avg_pool2d(x, 1).flatten(1))


@case(
    vectors(12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
    prep=lambda m: m.requires_grad_(False),
)
class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


@case(
    vectors(12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5), "c.weight": (4, 5)},
)
class HalfUnused(nn.Module):
    """the second output of a block is ignored; unused module"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)
        self.c = nn.Linear(8, 4)
        self.z = nn.Linear(7, 7)

    def f(self, x):
        h = F.relu(self.a(x))
        return (self.b(h), self.c(h))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)[0]


@case(
    vectors(12),
    {"b.weight": (ALL, [0, 1, 4])},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5), "c.weight": (4, 5)},
)
class DeadReader(nn.Module):
    """c reads too but its output goes nowhere"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)
        self.c = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        self.c(h)
        return self.b(h)


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class ModList(nn.Module):
    """python loops, zip, dict, lambda, f-string names, getattr"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)
        self.acts = nn.ModuleList([nn.ReLU(), nn.GELU()])

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for i, f in enumerate(self.acts):
            h = f(h) if i % 2 == 0 else h + f(h)
        return self.b(h)


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class SliceWrite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out = torch.zeros_like(h)
        out[:, 1:] = h[:, :-1]
        out[:, 0] = 1e-09 * h[:, 0]
        out[:, 2] += h[:, 1]
        return self.b(F.relu(out))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class NewZeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out = x.new_zeros(x.shape[0], 10, h.shape[-1])
        out[:, 3:8] = h
        return self.b(out)


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],), "c.weight": ([0, 1],), "c.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (4, 6), "c.weight": (6, 12), "c.bias": (6,)},
)
class Where(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)
        self.c = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h, k = (self.a(x), self.c(x))
        return self.b(torch.where(x[..., :1] > 0, h, k))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],), "c.weight": ([1, 2],), "c.bias": ([1, 2],)},
    {"a.weight": (7, 12), "a.bias": (7,), "b.weight": (4, 7), "c.weight": (7, 12), "c.bias": (7,)},
)
class Whereconf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)
        self.c = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h, k = (self.a(x), self.c(x))
        return self.b(torch.where(h > 0, h, k))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"g": (6,), "a.weight": (6, 12), "a.bias": (6,), "b.weight": (4, 6)},
)
class RawParam(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)
        self.g = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) * self.g.exp().view(1, 1, -1))


@case(
    vectors(5, 12),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (4, 6)},
)
class NonPersist(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)
        self.register_buffer("t", torch.randn(8), persistent=False)
        self.plain = torch.randn(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) * self.t * self.plain)


@case(
    vectors(12), {"a.weight": ([0, 1],), "a.bias": ([0, 1],)}, {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (4, 6)}
)
class GumbelDetached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h + (h.detach() - h).clamp(min=0))


@case(vectors(12), {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)}, {}, tracer="concrete")
class ReadMean(nn.Module):
    """python branch on a mean over channels that masks touch: the value must be as it was"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if h.mean() > 1000000.0:
            h = h * 2
        return self.b(h)


@case(
    lambda n, g: torch.rand(n, 6, generator=g) + 0.1,
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 6), "a.bias": (6,), "b.weight": (3, 6)},
)
class PositiveOnly(nn.Module):
    """its input's logarithm is nan for the random inputs that others are verified on"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.log()))


@case(
    lambda n, g: (torch.randint(0, 9, (4 * n,), generator=g), torch.arange(0, 4 * n, 4)),
    {"bag.weight": (ALL, [0, 1])},
    {"bag.weight": (9, 4), "b.weight": (3, 4)},
    rand=False,
)
class Offsets(nn.Module):
    """no integers but sorted ones fit"""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.b = nn.EmbeddingBag(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return self.b(self.bag(x, offsets))


@case(
    vectors(5, 6),
    {"a.weight": ([0, 1],), "a.bias": ([0, 1],)},
    {"a.weight": (6, 6), "a.bias": (6,), "b.weight": (3, 6)},
    rand=False,  # which looks at values, as nothing may inside vmap
)
class Mapped(nn.Module):
    """modules called inside vmap see wrapped tensors"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda t: self.b(self.a(t).relu()))(x)


@case(
    vectors(12),
    {"a.weight": ([0, 1, 4],), "a.bias": ([0, 1, 4],)},
    {"a.weight": (5, 12), "a.bias": (5,), "b.weight": (4, 5)},
)
class HoldsTensors(nn.Module):
    """an attribute to try is a list of tensors, which compare as no number does"""

    def __init__(self) -> None:
        super().__init__()
        self.held = [torch.ones(3), torch.ones(2)]
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 4)
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).view(-1, self.width)) * self.held[0].sum()
