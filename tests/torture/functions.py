"""One function between two linear layers, three of whose eight units in between are pruned."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torture import CASES, Case, vectors

PRUNED = [0, 1, 4]


class Between(nn.Module):
    """Linear, the function of ``(n, 5, 8)``, linear."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(fn(torch.zeros(2, 5, 8)).shape[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.fn(self.a(x)))
        return result


def between(zeros: int, constants: int) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    """Decorator: how many of the eight units must be left, pruned with their biases and without."""

    def add(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        for kind, count, names in (("zeros", zeros, ("a.weight", "a.bias")), ("constants", constants, ("a.weight",))):
            columns = Between(fn).b.in_features * count // 8
            left = {"a.weight": (count, 12), "a.bias": (count,), "b.weight": (3, columns)} if count < 8 else {}
            pruned = dict.fromkeys(names, (PRUNED,))
            CASES[f"{fn.__name__}-{kind}"] = Case(lambda: Between(fn), vectors(5, 12), pruned, left)
        return fn

    return add


@between(5, 5)
def cat_time(h: Tensor) -> Tensor:
    return torch.cat([h, h.flip(1)], 1)


@between(5, 5)
def cat_channels(h: Tensor) -> Tensor:
    return torch.cat([h, h * 2, h.roll(1, 1)], 2)


@between(5, 5)
def add_scalar_tensor(h: Tensor) -> Tensor:
    return h * torch.tensor(2.0) + h.new_tensor(0.0)


@between(5, 5)
def times_ones_shape(h: Tensor) -> Tensor:
    return h * torch.ones(h.shape[-1])


@between(5, 5)
def where_mask(h: Tensor) -> Tensor:
    return torch.where(torch.ones(5, 1, dtype=torch.bool).tril(), h, torch.zeros_like(h))


@between(5, 6)
def masked_fill(h: Tensor) -> Tensor:
    return h.masked_fill(torch.arange(5)[:, None] < 2, 0.0)


@between(5, 6)
def setitem(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = 0
    h[:, 1:3] = h[:, 1:3] * 2
    return h


@between(5, 8)
def setitem_mask(h: Tensor) -> Tensor:
    h = h.clone()
    h[h < 0] = 0
    return h


@between(5, 8)
def setitem_idx(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, torch.tensor([0, 2])] += 1.0 * h[:, torch.tensor([1, 3])]
    return h


@between(5, 5)
def expand_as(h: Tensor) -> Tensor:
    return h.mean(1, keepdim=True).expand_as(h) + h


@between(5, 5)
def expand_lit(h: Tensor) -> Tensor:
    return h.mean(1, keepdim=True).expand(-1, 5, 8) + h


@between(5, 5)
def repeat(h: Tensor) -> Tensor:
    return h.mean(1, keepdim=True).repeat(1, 5, 1) - h


@between(5, 5)
def tile_channels(h: Tensor) -> Tensor:
    return h.repeat(1, 1, 2)


@between(5, 5)
def repeat_interleave(h: Tensor) -> Tensor:
    return h.repeat_interleave(2, -1)


@between(5, 5)
def stack_flat(h: Tensor) -> Tensor:
    return torch.stack([h, -h], -1).flatten(2)


@between(5, 5)
def stack_flat2(h: Tensor) -> Tensor:
    return torch.stack([h, -h], 2).flatten(2)


@between(5, 5)
def view_lit(h: Tensor) -> Tensor:
    return h.reshape(-1, 8).tanh().reshape(h.shape[0], 5, 8)


@between(5, 5)
def view_neg(h: Tensor) -> Tensor:
    return h.reshape(-1, 40).tanh().reshape(-1, 5, 8)


@between(5, 5)
def unfold_time(h: Tensor) -> Tensor:
    return h.unfold(1, 3, 1).mean(-1)


@between(5, 6)
def avg1d(h: Tensor) -> Tensor:
    return F.avg_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2)


@between(5, 5)
def interp(h: Tensor) -> Tensor:
    return F.interpolate(h.transpose(1, 2), scale_factor=2).transpose(1, 2)


@between(5, 6)
def pad_time(h: Tensor) -> Tensor:
    return F.pad(h, (0, 0, 1, 1))


@between(5, 6)
def pad_last(h: Tensor) -> Tensor:
    return F.pad(h, (0, 0, 1, 0))[:, :-1]


@between(5, 6)
def shift(h: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)


@between(5, 5)
def diff(h: Tensor) -> Tensor:
    return torch.diff(h, dim=1)


@between(5, 5)
def std_time(h: Tensor) -> Tensor:
    return (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1e-05)


@between(5, 8)  # of a constant it depends on how many there are, which another input changes
def lse(h: Tensor) -> Tensor:
    return h.abs() * torch.logsumexp(h, 1, keepdim=True)


@between(5, 5)
def max_time(h: Tensor) -> Tensor:
    return h.max(1, keepdim=True).values + h


@between(5, 5)
def median_time(h: Tensor) -> Tensor:
    return h.median(1, keepdim=True).values + h


@between(5, 8)
def softmax_time(h: Tensor) -> Tensor:
    return h * h.softmax(1)


@between(8, 8)
def softmax_time_const(h: Tensor) -> Tensor:
    return h.softmax(1)


@between(5, 5)
def gelu_const(h: Tensor) -> Tensor:
    return F.gelu(h + 1)


@between(5, 5)
def sigmoid(h: Tensor) -> Tensor:
    return h.sigmoid()


@between(5, 8)
def prod(h: Tensor) -> Tensor:
    return h.prod(1, keepdim=True) + h


@between(5, 8)
def cumprod(h: Tensor) -> Tensor:
    return h.cumprod(1) + h


@between(5, 5)
def trace_mul(h: Tensor) -> Tensor:
    return h * h.detach()


@between(5, 5)
def fmod(h: Tensor) -> Tensor:
    return torch.fmod(h, 0.5) + torch.remainder(h, 0.3)


@between(5, 5)
def rounds(h: Tensor) -> Tensor:
    return h + h.round() - h.floor() + h.sign() * h.abs().ceil()


@between(5, 5)
def lerp(h: Tensor) -> Tensor:
    return torch.lerp(h, h.relu(), 0.3)


@between(5, 5)
def addcmul(h: Tensor) -> Tensor:
    return torch.addcmul(h, h, h, value=0.5)


@between(5, 5)
def bool_ops(h: Tensor) -> Tensor:
    return h * ((h > 0) & (h < 1)).float() + h * ~(h > 0.5)


@between(5, 5)
def argsort_time(h: Tensor) -> Tensor:
    return h.gather(1, h.argsort(1))


@between(5, 8)
def topk_idx(h: Tensor) -> Tensor:
    return h.gather(1, h.norm(dim=2, keepdim=True).topk(2, 1).indices.expand(-1, -1, h.shape[2]))


@between(5, 8)
def einsum_self(h: Tensor) -> Tensor:
    return torch.einsum("btc,bsc->bts", h, h) @ h


@between(5, 8)
def einsum_diag(h: Tensor) -> Tensor:
    return torch.einsum("btc,btc->bt", h, h)[..., None] * h


@between(5, 8)
def outer_prod(h: Tensor) -> Tensor:
    return (h[:, :, :, None] * h[:, :, None, :]).sum(-1)


@between(5, 5)
def chunk_add(h: Tensor) -> Tensor:
    return torch.cat([c * 2 for c in h.chunk(5, 1)], 1)


@between(5, 5)
def channels_chunk(h: Tensor) -> Tensor:
    a, b = h.chunk(2, -1)
    return torch.cat([b, a], -1)


@between(5, 5)
def roll_time(h: Tensor) -> Tensor:
    return h.roll((1, -1), (1, 1))


@between(5, 5)
def t_list(h: Tensor) -> Tensor:
    return torch.stack([h[:, i] for i in range(5)], 1)


@between(5, 5)
def t_unbind(h: Tensor) -> Tensor:
    return torch.stack([y.relu() for y in h.unbind(1)], 1)


@between(5, 6)
def loop_state(h: Tensor) -> Tensor:
    s = torch.zeros_like(h[:, 0])
    out = []
    for i in range(5):
        s = 0.5 * s + h[:, i]
        out.append(s)
    return torch.stack(out, 1)


@between(5, 6)
def loop_write(h: Tensor) -> Tensor:
    out = torch.empty_like(h)
    for i in range(5):
        out[:, i] = h[:, i] * i
    return out


@between(5, 5)
def select_scatter(h: Tensor) -> Tensor:
    return torch.select_scatter(h, h[:, 1], 1, 0)


@between(5, 5)
def split_sizes(h: Tensor) -> Tensor:
    a, b = h.split([2, 3], 1)
    return torch.cat([b, a], 1)


@between(5, 5)
def hsplit(h: Tensor) -> Tensor:
    return torch.cat(torch.tensor_split(h, 2, 1), 1)


@between(5, 5)
def squeeze(h: Tensor) -> Tensor:
    return h.unsqueeze(1).squeeze(1).unsqueeze(-1)[..., 0]


@between(5, 6)
def linspace(h: Tensor) -> Tensor:
    return h * torch.linspace(0, 1, 5)[None, :, None]


@between(5, 8)
def complex_rot(h: Tensor) -> Tensor:
    c = torch.view_as_complex(torch.stack([h, h * 0.5], -1))
    return torch.view_as_real(c * torch.polar(torch.ones(5, 1), torch.arange(5.0)[:, None])).sum(-1)


@between(5, 5)
def log1p(h: Tensor) -> Tensor:
    return torch.log1p(h.relu()) * torch.special.expit(h) + torch.special.erf(h)


@between(5, 5)
def threshold(h: Tensor) -> Tensor:
    return F.threshold(h, 0.1, 0.0) + F.hardshrink(h) + F.softshrink(h) + F.tanhshrink(h)


@between(5, 5)
def prelu(h: Tensor) -> Tensor:
    return F.prelu(h.transpose(1, 2), torch.full((1,), 0.2)).transpose(1, 2)


@between(5, 5)
def layer_norm_time(h: Tensor) -> Tensor:
    return F.layer_norm(h.transpose(1, 2), (5,)).transpose(1, 2)


@between(5, 5)
def instance(h: Tensor) -> Tensor:
    return F.instance_norm(h.transpose(1, 2)).transpose(1, 2)


@between(5, 8)
def normalize_time(h: Tensor) -> Tensor:
    return F.normalize(h, dim=1)


@between(5, 8)
def mse(h: Tensor) -> Tensor:
    return h * ((h - h.mean(1, keepdim=True)) ** 2).sum((1, 2), keepdim=True)


@between(5, 5)
def glu_time(h: Tensor) -> Tensor:
    return F.glu(h[:, :4], 1)


@between(5, 5)
def scale_by_width(h: Tensor) -> Tensor:
    return h / h.shape[-1]


@between(5, 5)
def scale_by_sqrt_width(h: Tensor) -> Tensor:
    return h * h.size(-1) ** (-0.5)


@between(8, 8)
def python_sum_width(h: Tensor) -> Tensor:
    return h * sum(h.shape)


@between(5, 8)
def triangle(h: Tensor) -> Tensor:
    h = h.transpose(1, 2)
    return (h[..., None] * h[..., None, :]).tril().sum(-1).transpose(1, 2)


@between(5, 8)
def index_fill(h: Tensor) -> Tensor:
    return h.index_fill(1, torch.tensor([0, 2]), 0.0)
