"""Heads: sizes in dicts, frozen dataclasses, globals and properties; grouped queries; scales from shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import ALL, CASES, Case, Projections, case, vectors

# The first of three heads of four dims, in the rows of q, k and v, and what then is left.
HEAD = {
    "q.weight": ([0, 1, 2, 3],),
    "q.bias": ([0, 1, 2, 3],),
    "k.weight": ([0, 1, 2, 3],),
    "k.bias": ([0, 1, 2, 3],),
    "v.weight": ([0, 1, 2, 3],),
    "v.bias": ([0, 1, 2, 3],),
}
HEAD_GONE = {
    "q.weight": (8, 12),
    "q.bias": (8,),
    "k.weight": (8, 12),
    "k.bias": (8,),
    "v.weight": (8, 12),
    "v.bias": (8,),
    "o.weight": (12, 8),
}
OF_FOUR_GONE = {name: tuple(9 if n == 8 else n for n in shape) for name, shape in HEAD_GONE.items()}


def attn(q, k, v, scale):
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


@case(
    vectors(5, 12),
    {
        "q.weight": ([0, 2, 4, 6, 8, 10],),
        "q.bias": ([0, 2, 4, 6, 8, 10],),
        "k.weight": ([0, 2, 4, 6, 8, 10],),
        "k.bias": ([0, 2, 4, 6, 8, 10],),
        "v.weight": ([0, 2, 4, 6, 8, 10],),
        "v.bias": ([0, 2, 4, 6, 8, 10],),
    },
    {
        "q.weight": (6, 12),
        "q.bias": (6,),
        "k.weight": (6, 12),
        "k.bias": (6,),
        "v.weight": (6, 12),
        "v.bias": (6,),
        "o.weight": (12, 6),
    },
)
class SqrtShape(Projections):
    """1/sqrt(d) computed from the shape"""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3

    def forward(self, x: Tensor) -> Tensor:
        n, t, _c = x.shape
        q, k, v = (p(x).view(n, t, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(attn(q * 3, k, v, 1 / math.sqrt(q.size(-1))).transpose(1, 2).reshape(n, t, -1))


@case(
    vectors(5, 12),
    HEAD,
    HEAD_GONE,
)
class DictCfg(Projections):
    """sizes in a dict attribute"""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = {"heads": 3, "size": (3, 4)}

    def forward(self, x: Tensor) -> Tensor:
        n, t, _c = x.shape
        q, k, v = (p(x).view(n, t, *self.cfg["size"]).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(attn(q, k, v, 0.5).transpose(1, 2).reshape(n, t, -1))


@dataclass(frozen=True)
class Cfg:
    heads: int = 3
    dim: int = 12


@case(
    vectors(5, 12),
    HEAD,
    HEAD_GONE,
)
class FrozenCfg(Projections):
    def __init__(self) -> None:
        super().__init__()
        self.conf = Cfg()

    def forward(self, x: Tensor) -> Tensor:
        n, t, _c = x.shape
        d = self.conf.dim // self.conf.heads
        q, k, v = (p(x).view(n, t, self.conf.heads, d).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(attn(q, k, v, 0.5).transpose(1, 2).reshape(n, t, self.conf.dim))


HEADS = 3


@case(
    vectors(5, 12),
    HEAD,
    HEAD_GONE,
)
class GlobalConst(Projections):
    def split(self, x):
        return x.view(*x.shape[:2], HEADS, x.shape[-1] // HEADS).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.split, (self.q(x), self.k(x), self.v(x)))
        o = attn(q, k, v, 0.5).transpose(1, 2).contiguous()
        return self.o(o.view(*o.shape[:2], 12))


@case(
    vectors(5, 12),
    HEAD,
    HEAD_GONE,
)
class PropAttr(Projections):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 4

    @property
    def heads(self):
        return self.q.out_features // self.head_dim

    def forward(self, x: Tensor) -> Tensor:
        _n, _t, _c = x.shape
        q, k, v = (p(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(attn(q, k, v, 0.5).transpose(1, 2).flatten(2))


@case(
    vectors(5, 12),
    {"o.weight": (ALL, [0, 1, 2, 3, 4, 5, 6, 7])},
    {
        "q.weight": (8, 12),
        "q.bias": (8,),
        "k.weight": (4, 12),
        "k.bias": (4,),
        "v.weight": (4, 12),
        "v.bias": (4,),
        "o.weight": (12, 8),
    },
)
class GQAEnable(nn.Module):
    """sdpa enable_gqa"""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 16)
        self.k = nn.Linear(12, 8)
        self.v = nn.Linear(12, 8)
        self.o = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _c = x.shape
        q, k, v = (p(x).view(n, t, -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


@case(
    vectors(5, 12),
    {"o.weight": (ALL, [0, 1, 5, 6, 8, 11])},
    {"qkv.weight": (30, 12), "qkv.bias": (30,), "o.weight": (12, 6)},
)
class FusedChunk(nn.Module):
    """Values with fewer dims than queries and keys: the chunks come out unequal"""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.o = nn.Linear(12, 12)
        self.heads, self.dims = 3, 4

    def forward(self, x: Tensor) -> Tensor:
        n, t, _c = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (p.view(n, t, -1, self.dims).transpose(1, 2) for p in (q, k, v))
        o = attn(q, k, v, 0.5).transpose(1, 2).contiguous()
        return self.o(o.view(n, t, -1))


@case(
    vectors(5, 12),
    {"o.weight": (ALL, [0, 1, 2, 3, 8, 9, 10, 11])},
    {"qkv.weight": (24, 12), "qkv.bias": (24,), "o.weight": (12, 8)},
)
class SlicesAtHalf(nn.Module):
    """Grouped queries that happen to take half of a fused axis: a query head of each group leaves, no key does"""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 32)
        self.o = nn.Linear(16, 12)
        self.heads, self.shared, self.dims = 4, 2, 4

    def forward(self, x: Tensor) -> Tensor:
        n, t, _c = x.shape
        qkv = self.qkv(x)
        end, more = self.heads * self.dims, self.shared * self.dims
        q, k, v = qkv[..., :end], qkv[..., end : end + more], qkv[..., end + more :]
        q, k, v = (p.view(n, t, -1, self.dims).transpose(1, 2) for p in (q, k, v))
        groups = self.heads // self.shared
        k, v = (p[:, :, None].expand(n, self.shared, groups, t, self.dims).flatten(1, 2) for p in (k, v))
        return self.o(attn(q, k, v, 0.5).transpose(1, 2).reshape(n, t, -1))


@case(
    vectors(5, 12),
    {"o.weight": (ALL, [0, 1, 2, 3, 8, 9, 10, 11])},
    {"qkv.weight": (16, 12), "qkv.bias": (16,), "o.weight": (12, 8)},
)
class MultiQuery(nn.Module):
    """One key and one value head stand behind the query heads, and are looked up from the end"""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 24)
        self.o = nn.Linear(16, 12)
        self.heads, self.dims = 4, 4

    def forward(self, x: Tensor) -> Tensor:
        n, t, _c = x.shape
        qkv = self.qkv(x).view(n, t, self.heads + 2, self.dims)
        q, k, v = (p.transpose(1, 2) for p in (qkv[..., :-2, :], qkv[..., [-2], :], qkv[..., [-1], :]))
        return self.o(attn(q, k, v, 0.5).transpose(1, 2).reshape(n, t, self.heads * self.dims))


@case(
    vectors(5, 12),
    {f"{name}.{part}": ([0, 2, 4, 6, 8, 10],) for name in "qkv" for part in ("weight", "bias")},
    {f"{name}.weight": (6, 12) for name in "qkv"} | {f"{name}.bias": (6,) for name in "qkv"} | {"o.weight": (12, 6)},
)
class SizeInTensor(Projections):
    """The scale is the root of a tensor that is made from a size"""

    def forward(self, x: Tensor) -> Tensor:
        n, t, _c = x.shape
        q, k, v = (p(x).view(n, t, 3, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        scale = torch.sqrt(torch.tensor(q.size(-1), dtype=torch.float) * 3)
        return self.o(attn(q * 3, k, v, 1 / scale).transpose(1, 2).reshape(n, t, -1))


@case(
    vectors(9, 12),
    {
        "qkv.weight": ([0, 1, 2, 3, 12, 13, 14, 15, 24, 25, 26, 27],),
        "qkv.bias": ([0, 1, 2, 3, 12, 13, 14, 15, 24, 25, 26, 27],),
    },
    {"qkv.weight": (24, 12), "qkv.bias": (24,), "o.weight": (12, 8)},
)
class PooledHeads(nn.Module):
    """heads join the batch of a padded depthwise convolution, which their zeros and constants pass"""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 3, 4
        self.qkv, self.o = nn.Linear(12, 36), nn.Linear(12, 12)
        self.pools = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False) for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        parts = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        pooled = []
        for part, pool, norm in zip(parts, self.pools, self.norms, strict=True):
            image = part.reshape(b * self.heads, 3, 3, self.size).permute(0, 3, 1, 2)
            pooled.append(norm(pool(image).reshape(b, self.heads, self.size, n).transpose(2, 3)))
        q, k, v = pooled
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v + q
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


class Biased(nn.Module):
    """Scores with a bias for each head, which comes from outside or is made of a table, and is handed on whole."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.o = nn.Linear(12, 12)
        self.heads = 3
        self.table = nn.Embedding(5, 3) if table else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, t, _c = x.shape
        if bias is None:
            places = torch.arange(t)
            bias = self.table((places[:, None] - places).abs().clamp(max=4)).permute(2, 0, 1)[None]
        part = bias[..., -t:]
        q, k, v = (p.view(n, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        attend = biased
        return self.o(attend(q, k, v, bias=part).transpose(1, 2).reshape(n, t, -1)), bias


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * 0.5
    scores = scores + bias
    return scores.softmax(-1) @ v


# each of two layers loses another of three heads
other_heads = case(
    vectors(5, 12),
    {"a.o.weight": (ALL, [0, 1, 2, 3]), "b.o.weight": (ALL, [4, 5, 6, 7])},
    {
        f"{name}.{key}": shape
        for name in "ab"
        for key, shape in (("qkv.weight", (24, 12)), ("qkv.bias", (24,)), ("o.weight", (12, 8)))
    },
)


@other_heads
class SharedTable(nn.Module):
    """Two layers share the position bias of one, and lose different heads"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Biased(True), Biased(False)

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self.a(x)
        return self.b(x, bias)[0]


class Sloped(nn.Module):
    """Slopes come with the heads folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.o = nn.Linear(12, 12)
        self.heads = 3

    def forward(self, x: Tensor, slopes: Tensor) -> Tensor:
        n, t, _c = x.shape
        q, k, v = (
            p.reshape(n, t, self.heads, -1).transpose(1, 2).reshape(n * self.heads, t, -1)
            for p in self.qkv(x).chunk(3, -1)
        )
        weights = slopes.baddbmm(q, k.transpose(1, 2), alpha=0.5).softmax(-1)
        return self.o((weights @ v).view(n, self.heads, t, -1).transpose(1, 2).reshape(n, t, -1))


@other_heads
class SharedSlopes(nn.Module):
    """Slopes that no parameter holds: each layer takes those of its heads"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Sloped(), Sloped()

    def forward(self, x: Tensor) -> Tensor:
        n, t, _c = x.shape
        slopes = (2.0 ** -torch.arange(1, 4))[None, :, None] * torch.arange(t)[None, None]
        slopes = slopes.repeat(n, 1, 1).view(n * 3, 1, t)
        return self.b(self.a(x, slopes), slopes)


@case(
    vectors(5, 8),
    {
        "qkv.weight": ([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19],),
        "qkv.bias": ([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19],),
    },
    {"qkv.weight": (12, 8), "qkv.bias": (12,), "o.weight": (8, 4)},
)
class OneHeadLeft(nn.Module):
    """einsum lays an axis of size 1 out in another order"""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)
        self.far = nn.Parameter(torch.randn(5, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) + torch.einsum("bhic,ijc->bhij", q, self.far)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


class Baddbmm(nn.Module):
    """scores added to zeros of a computed size, as kernels for half precision had it; parts taken by slices"""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.o = nn.Linear(12, 12)
        self.heads, self.size = 3, 4

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, self.heads, 3 * self.size)
        q = qkv[..., : self.size].transpose(1, 2).reshape(b * self.heads, n, self.size)
        k = qkv[..., self.size : 2 * self.size].transpose(1, 2).reshape(b * self.heads, n, self.size)
        v = qkv[..., 2 * self.size :].transpose(1, 2)
        scores = torch.zeros(b * self.heads, n, n, dtype=x.dtype, device=x.device)
        scores = torch.baddbmm(scores, q, k.transpose(1, 2), beta=1.0, alpha=0.5)
        y = (scores.view(b, self.heads, n, n) + x[:, None, None, :, 0]).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


CASES["BaddbmmHeads"] = Case(
    Baddbmm,
    vectors(5, 12),
    {"o.weight": (ALL, slice(4, 8))},
    {"qkv.weight": (24, 12), "qkv.bias": (24,), "o.weight": (12, 8)},
)
_SCORES = [12 * head + part + dim for head in range(3) for part in (0, 4) for dim in (0, 2)]
CASES["BaddbmmDims"] = Case(
    Baddbmm,
    vectors(5, 12),
    {"qkv.weight": (_SCORES,), "qkv.bias": (_SCORES,)},
    {"qkv.weight": (24, 12), "qkv.bias": (24,)},
)


_Q_AND_K = [12 * part + 4 * head + dim for part in (0, 1) for head in range(3) for dim in (0, 2)]


@case(
    vectors(5, 12),
    {"qkv.weight": (_Q_AND_K,), "qkv.bias": (_Q_AND_K,)},
    {"qkv.weight": (24, 12), "qkv.bias": (24,)},
)
class SizesByMath(nn.Module):
    """sizes added up as tuples, through reshapes that cancel, and a layer made on the way"""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.o = nn.Linear(12, 12)
        self.heads, self.size = 3, 4

    def cut(self, x: Tensor) -> Tensor:
        parts = (1, self.heads, self.size)
        cut = x.reshape(x.shape[:-1] + parts)
        return cut.reshape(x.shape[:-1] + cut.shape[-2:]).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.cut(part) for part in torch.split(self.qkv(x), self.heads * self.size, dim=-1))
        y = nn.Softmax(dim=-1)(q @ k.transpose(2, 3) * 0.5) @ v
        width = (self.heads * self.size,)
        return self.o(y.transpose(1, 2).reshape(x.shape[:-1] + width))


@case(
    vectors(5, 12),
    {"o.weight": (ALL, slice(4, 8))},
    {"q.weight": (8, 12), "q.bias": (8,), "o.weight": (12, 8)},
)
class CopiedHeads(nn.Module):
    """Two value heads, each copied for all query heads: single query heads leave, and their copies with them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q = nn.Linear(12, 12)
        self.v = nn.Linear(12, 8)
        self.o = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, 4).transpose(1, 2)
        gate, shift = (v.repeat(1, self.heads, 1, 1) for v in self.v(x).view(n, t, 2, 4).transpose(1, 2).chunk(2, 1))
        return self.o((q * gate + shift).transpose(1, 2).reshape(n, t, -1))


@case(
    vectors(3, 5, 8),
    {"merge.weight": (ALL, slice(0, 4))},
    {"qkv.weight": (12, 8), "qkv.bias": (12,), "merge.weight": (8, 4)},
)
class EinsumOfOneHead(nn.Module):
    """einsum moves an axis of one head elsewhere, and the reshape behind it, whose size is the input's, is at fault"""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 2, 4
        self.qkv, self.merge = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, g, t, width = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        q = q.reshape(b, g, t, self.heads, self.dim).permute(0, 1, 3, 2, 4)
        k = k.reshape(b, g, t, self.heads, self.dim).permute(0, 1, 3, 2, 4)
        v = v.reshape(b, g, t, self.heads, self.dim).permute(0, 1, 3, 2, 4)
        weights = torch.einsum("bghid, bghjd -> bghij", q, k).softmax(-1)
        out = torch.einsum("bghij, bghjd -> bghid", weights, v)
        return self.merge(out.permute(0, 1, 3, 2, 4).reshape(b, g, t, width))


# The first of four value dims of each head, in what reads it.
VALUE_DIMS = {"o.weight": (ALL, [0, 4, 8])}
VALUE_DIMS_GONE = {"v.weight": (9, 12), "v.bias": (9,), "o.weight": (12, 9)}


@case(vectors(5, 12), VALUE_DIMS, VALUE_DIMS_GONE)
class ViewOfTheSameSizes(Projections):
    """Sizes that a value has already, written out: only where they no longer fit do they do anything."""

    dim = 4

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        q, k, v = (layer(x).view(n, t, 3, self.dim).permute(0, 2, 1, 3) for layer in (self.q, self.k, self.v))
        scores = torch.masked_fill(torch.matmul(q, k.transpose(-1, -2)), torch.tensor(False), 0.0)
        h = torch.matmul(torch.softmax(scores, -1), v)
        h = h.view(n, 3, t, self.dim).permute(0, 2, 1, 3)
        return self.o(h.reshape(n, t, -1))


@case(vectors(5, 12), VALUE_DIMS, VALUE_DIMS_GONE)
class StateOfZeros(Projections):
    """Linear attention: a state of keys times values starts as zeros of a type and on a device."""

    dim = 4

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        q, k, v = (layer(x).view(n, t, 3, self.dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        state = torch.zeros(n, 3, self.dim, self.dim, device=x.device, dtype=x.dtype)
        state = state + k.transpose(2, 3) @ v
        return self.o((q @ state).transpose(1, 2).flatten(2))


@case(vectors(5, 12), {"o.weight": (ALL, [0, 4, 8, 12])}, {"v.weight": (6, 12), "v.bias": (6,), "o.weight": (12, 12)})
class GroupsByShape(nn.Module):
    """Whether the kernel or the author repeats keys and values is chosen by their sizes, where no name tells."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(12, 16), nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(16, 12)
        self.dim = 4

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = k.shape[-1] == v.shape[-1]
        if not grouped:
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(t), 4, -1, t.shape[-1]) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=grouped)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, -1, self.dim).transpose(1, 2)
        k = self.k(x).view(n, t, -1, self.dim).transpose(1, 2)
        v = self.v(x).view(n, t, -1, self.dim).transpose(1, 2)
        attend = self.attend
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))


@case(
    vectors(5, 12),
    {
        "q.weight": ([3, 7, 11],),
        "q.bias": ([3, 7, 11],),
        "k.weight": ([3, 7, 11],),
        "k.bias": ([3, 7, 11],),
        "o.weight": (ALL, [0, 1, 4, 5, 8, 9]),
    },
    {
        "q.weight": (9, 12),
        "q.bias": (9,),
        "k.weight": (9, 12),
        "k.bias": (9,),
        "v.weight": (6, 12),
        "v.bias": (6,),
        "o.weight": (12, 6),
        "table": (5, 5, 3),
    },
)
class ChecksItsSizes(Projections):
    """The author compares sizes, and raises where they are not the ones that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.table = 4, nn.Parameter(torch.ones(5, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        q, k, v = (layer(x).view(n, t, 3, self.dim).transpose(1, 2).flatten(0, 1) for layer in (self.q, self.k, self.v))
        scores = torch.bmm(q, k.transpose(1, 2))
        if scores.shape != (n * 3, t, t):
            raise ValueError("there is a score for each query and key")
        places = q.contiguous().view(n * 3, -1, self.dim).transpose(0, 1) @ self.table.transpose(-2, -1)
        h = torch.bmm((scores + places.transpose(0, 1).view(n * 3, t, t)).softmax(-1), v)
        if h.size() != (n * 3, t, self.dim):
            raise ValueError(f"heads are of size {h.size()}, not {(n, 3, t, self.dim)}")
        return self.o(h.view(n, 3, t, self.dim).transpose(1, 2).reshape(n, t, -1))


class Repeated(nn.Module):
    """A mask for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2) > 0).unsqueeze(1).repeat(1, self.heads, 1, 1)


@case(vectors(5, 12), HEAD, HEAD_GONE)
class LastMaskUnread(Projections):
    """Masks for the next layer are made behind the last layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = Repeated()

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        q, k, v = (layer(x).view(n, t, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2)).masked_fill(self.masks(x), -2.0)
        h = self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        self.masks(h)
        return h


@case(vectors(7, 12), {"v.weight": ([0, 1, 2],)}, OF_FOUR_GONE)
class TurnedAbout(Projections):
    """tokens stand behind the channels, and the values are constant: constant @ softmax.T = constant"""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).transpose(1, 2).reshape(x.shape[0], 4, 3, -1) for p in (self.q, self.k, self.v))
        scores = (q.transpose(-2, -1) @ k).softmax(-1)
        out = v @ scores.transpose(-2, -1)
        return self.o(out.reshape(x.shape[0], -1, x.shape[1]).transpose(1, 2))


@case(vectors(5, 12), {"v.weight": ([0, 1, 2],)}, OF_FOUR_GONE)
class BehindAClassToken(Projections):
    """the values of one head are constant, those of the token in front too, in all heads"""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = (p(x).unflatten(-1, (4, 3)).transpose(1, 2) for p in (self.q, self.k, self.v))
        out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2))
