"""What stands between a model's layers and the ops that they make: scripts, packed sequences, ``vmap``, subclasses."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import ALL, Projections, case, images, vectors

ROWS = [0, 1, 4]


class Two(nn.Module):
    """Eight units between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(8, 4)


@case(
    vectors(6),
    {"a.weight": (ROWS,), "b.weight": ([0],)},
    {"a.weight": (5, 6), "a.bias": (5,), "b.weight": (4, 5)},
    rand=False,  # which reads values
)
class VmapOfLayers(Two):
    """The bias is added by an op of its own, behind a squeeze."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: self.b(self.a(row).relu()))(x)


@case(
    vectors(6),
    {"a.weight": (ROWS,), "a.bias": (ROWS,)},
    {"a.weight": (5, 6), "a.bias": (5,), "b.weight": (4, 5)},
)
class Scripted(Two):
    def __init__(self) -> None:
        super().__init__()
        self.c = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(self.a(x)))


@case(vectors(6), {"a.weight": (ROWS,), "a.bias": (ROWS,)}, {})
class TwoResults(Two):
    """A pointwise op with two results."""

    def forward(self, x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(self.a(x).relu())
        return self.b(mantissa * exponent)


class WithoutBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class WithoutBiasConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


@case(vectors(6), {"a.weight": (ROWS,)}, {})
class ReadsNoBias(nn.Module):
    """A linear that would take no notice of a new bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), WithoutBias(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@case(images(), {"a.weight": (ROWS,)}, {})
class ReadsNoBiasConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), WithoutBiasConv(8, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@case(
    vectors(7, 6),
    {"i.weight": (ROWS,), "i.bias": (ROWS,)},
    {},
    tracer="concrete",
)
class Packed(nn.Module):
    """The constructor of a packed sequence checks what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.r = nn.Linear(6, 8), nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([x.shape[1] - (i > 0) for i in range(len(x))])
        packed = nn.utils.rnn.pack_padded_sequence(self.i(x), lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True)[0]


@case(
    vectors(5, 12),
    {f"{n}.{p}": (slice(0, 3),) for n in "qkv" for p in ("weight", "bias")},
    {f"{n}.weight": (9, 12) for n in "qkv"} | {f"{n}.bias": (9,) for n in "qkv"} | {"o.weight": (12, 9)},
)
class MaskOfTwice(Projections):
    """The mask of the scores is made of one tensor twice."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, -1, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        half = torch.arange(t, dtype=x.dtype)
        mask = -torch.stack([half, half]).sum(0, keepdim=True)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


@case(
    vectors(6),
    {"a.weight": (slice(0, 4),), "a.bias": (slice(0, 4),)},
    {"a.weight": (6, 6), "a.bias": (6,), "b.weight": (4, 6)},
)
class ZerosAsComplex(Two):
    """Numbers that are zero in a part, whole or not, are complex all the same."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = (torch.view_as_complex(part.reshape(-1, 2, 2)) for part in self.a(x).split(4, -1))
        return self.b(torch.cat([torch.view_as_real(z * torch.exp(z)).flatten(1) for z in (first, second)], -1))


@case(vectors(6), {"a.weight": (ROWS,)}, {})
class WhileItIsLong(Two):
    """How often the loop runs depends on the masks, and on the input."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        while h.norm() > 1:
            h = h / 2
        return self.b(h)


@case(
    vectors(6),
    {"gate.bias": ([0],), "a.weight": ([0, 1],), "b.weight": (ALL, ROWS)},
    {"a.weight": (5, 6), "a.bias": (5,), "b.weight": (4, 5)},
    prep=lambda model: nn.init.constant_(model.gate.bias, 1),
)
class TheMasksDecide(Two):
    """The dense model takes the other branch, and ``c`` stays as it is: nobody reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.gate = nn.Linear(6, 4), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x) if self.gate.bias > 0 else self.b(self.a(x).relu())


@functools.lru_cache
def rising(count: int) -> Tensor:
    return torch.arange(count) + 1.0


def remembered(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """A decorator around the cache, which stands nowhere by name."""
    cached = functools.lru_cache(function)
    return lambda count: cached(count)


@remembered
def squares(count: int) -> Tensor:
    return torch.arange(count) ** 2.0


@case(
    vectors(6),
    {"a.weight": ([0, 1, 4, 5],), "a.bias": ([0, 1, 4, 5],)},
    {"a.weight": (4, 6), "a.bias": (4,), "b.weight": (4, 4)},
    rand=False,  # that would call it, and the caches are to be empty
)
class RemembersTables(Two):
    """What a trace computes must not be remembered."""

    @staticmethod
    @functools.lru_cache
    def falling(count: int) -> Tensor:
        return -rising(count)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * rising(4) + self.falling(4) * squares(4)


@functools.lru_cache
def halves(count: int) -> Tensor:
    return torch.full((count,), 0.5)


@case(
    vectors(6),
    {"a.weight": ([0, 1, 4, 5],), "a.bias": ([0, 1, 4, 5],)},
    {"a.weight": (4, 6), "a.bias": (4,), "b.weight": (4, 4)},
)
class ReadsWhatIsRemembered(Two):
    """What was remembered before the trace has the dense size."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() * halves(self.width))
