"""Random networks: directed acyclic graphs of the usual layers over images, tokens and vectors, with random masks.

A network is a list of steps over a growing list of values. Values have the shapes ``(C, H, W)`` (an image),
``(T, C)`` (tokens) or ``(C,)`` (a vector), batch not counted. All choices come from one ``random.Random``, so that
hypothesis can draw and shrink them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
LARGEST = 24  # channels

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    *(F.relu, F.gelu, F.silu, torch.tanh, F.hardswish, F.elu),  # zero stays zero
    *(torch.sigmoid, F.softplus, torch.cos, lambda x: 2 * x + 1, lambda x: x.clamp(-0.5, 1.0), lambda x: 0.3 - x),
]


@dataclass
class Step:
    """``values[i] ... -> one or more values``."""

    fn: Callable[..., Any]
    inputs: list[int]
    module: str = ""


class RandomNet(nn.Module):
    """A network that ``r`` draws."""

    def __init__(self, r: random.Random, size: int) -> None:
        super().__init__()
        self.r = r
        self.steps: list[Step] = []
        self.shapes: list[Shape] = [(3, 8, 8)]
        self.layers = nn.ModuleDict()
        self.conv(0)
        for _ in range(size):
            i = self.some()
            r.choice({3: IMAGE, 2: TOKENS, 1: VECTOR}[len(self.shapes[i])])(self, i)
        self.ends = self.unread()[-4:]
        width = sum(self.shapes[i][0 if len(self.shapes[i]) == 3 else -1] for i in self.ends)
        self.hidden = nn.Linear(width, r.choice([6, 9]))
        self.norm = r.choice([nn.Identity, nn.LayerNorm, nn.BatchNorm1d])(self.hidden.out_features)
        self.head = nn.Linear(self.hidden.out_features, 4)

    def forward(self, x: Tensor) -> Tensor:
        values: list[Tensor] = [x]
        for step in self.steps:
            given = [values[i] for i in step.inputs]
            result = step.fn(*([self.layers[step.module]] if step.module else []), *given)
            values += result if isinstance(result, (tuple, list)) else [result]
        return self.head(F.gelu(self.norm(self.hidden(torch.cat([_pooled(values[i]) for i in self.ends], 1)))))

    def __repr__(self) -> str:
        lines, at = [], 1
        for step in self.steps:
            name = getattr(step.fn, "__qualname__", repr(step.fn))
            shape = self.shapes[at] if at < len(self.shapes) else ()
            what = repr(self.layers[step.module]).replace("\n", "") if step.module else name
            lines.append(f"v{at} {shape} = {what} of {step.inputs}  [{step.module}]")
            at += step.fn.parts if isinstance(step.fn, Cut) else 1
        return "\n".join([*lines, f"ends {self.ends}, {self.hidden}, {self.norm}"])

    # -- what the drawn steps use ----------------------------------------------------------------------

    def some(self) -> int:
        """A value, more often a late one."""
        n = len(self.shapes)
        return max(self.r.randrange(1, n), self.r.randrange(1, n))

    def unread(self) -> list[int]:
        read = {i for s in self.steps for i in s.inputs}
        return [i for i in range(1, len(self.shapes)) if i not in read]

    def emit(
        self, fn: Callable[..., Any], inputs: Sequence[int], *shapes: Shape, module: nn.Module | None = None
    ) -> int:
        name = f"n{len(self.steps)}" if module is not None else ""
        if module is not None:
            self.layers[name] = module
        self.steps.append(Step(fn, list(inputs), name))
        self.shapes += shapes
        return len(self.shapes) - 1

    def layer(self, module: nn.Module, i: int, shape: Shape | None = None) -> int:
        return self.emit(_apply, [i], self.shapes[i] if shape is None else shape, module=module)

    def divisor(self, n: int, *wanted: int) -> int:
        return self.r.choice([g for g in wanted if n % g == 0] or [1])

    def coin(self, p: float = 0.5) -> bool:
        return self.r.random() < p

    # -- images ----------------------------------------------------------------------------------------

    def conv(self, i: int, out: int | None = None, kernel: int | None = None) -> int:
        c, h, w = self.shapes[i]
        kernel = kernel or self.r.choice([1, 3])
        groups = self.divisor(c, 1, 1, 2, 3, c) if out is None else 1
        out = out or groups * self.r.choice([n for n in (1, 2, 3, 4, 6, 8) if 4 <= n * groups <= LARGEST] or [1])
        dilation = self.r.choice([1, 1, 2]) if kernel == 3 and h >= 5 and out is None else 1
        reach = dilation * (kernel - 1)
        padding = reach // 2 if h <= reach or kernel == 1 or self.coin(0.7) else 0
        mode = self.r.choice(["zeros", "zeros", "reflect", "circular", "replicate"]) if h > padding > 0 else "zeros"
        stride = 2 if kernel == 3 and h >= 4 and self.coin(0.2) else 1
        h, w = ((n + 2 * padding - reach - 1) // stride + 1 for n in (h, w))
        module = nn.Conv2d(c, out, kernel, stride, padding, dilation, groups, self.coin(0.7), mode)
        return self.layer(module, i, (out, h, w))

    def transposed(self, i: int) -> int:
        c, h, w = self.shapes[i]
        if h > 5:
            return self.activation(i)
        groups = self.divisor(c, 1, 2, c)
        out = groups * self.r.choice([n for n in (1, 2, 3) if n * groups <= LARGEST])
        kernel, padding, extra = self.r.choice([(2, 0, 0), (3, 1, 1), (1, 0, 1), (3, 1, 0)])
        h, w = (2 * (n - 1) - 2 * padding + kernel + extra for n in (h, w))
        module = nn.ConvTranspose2d(c, out, kernel, 2, padding, extra, groups, self.coin(0.7))
        return self.layer(module, i, (out, h, w))

    def norm_image(self, i: int) -> int:
        c, h, w = self.shapes[i]
        kinds: list[nn.Module] = [nn.BatchNorm2d(c), nn.BatchNorm2d(c), nn.BatchNorm2d(c, affine=False), nn.PReLU(c)]
        kinds += [OverChannels(nn.LayerNorm(c))]
        kinds += [nn.GroupNorm(g, c) for g in (1, 2, 3) if c % g == 0]
        if h * w > 1:
            kinds += [nn.InstanceNorm2d(c, affine=affine, track_running_stats=affine) for affine in (True, False)]
            kinds += [nn.InstanceNorm2d(c, affine=True)]
        return self.layer(self.r.choice(kinds), i)

    def activation(self, i: int) -> int:
        return self.emit(self.r.choice(ACTIVATIONS), [i], self.shapes[i])

    def pool(self, i: int) -> int:
        c, h, w = self.shapes[i]
        if h < 4:
            return self.emit(Call(F.adaptive_avg_pool2d, 1), [i], (c, 1, 1))
        fn: Callable[..., Any] = self.r.choice([F.max_pool2d, F.avg_pool2d])
        kernel, padding = self.r.choice([(2, 0), (3, 1)])
        h, w = ((n + 2 * padding - kernel) // 2 + 1 for n in (h, w))
        return self.emit(Call(fn, kernel, 2, padding), [i], (c, h, w))

    def upsample(self, i: int) -> int:
        c, h, w = self.shapes[i]
        if h > 5:
            return self.activation(i)
        mode = self.r.choice(["nearest", "bilinear"])
        return self.emit(Call(F.interpolate, scale_factor=2, mode=mode), [i], (c, 2 * h, 2 * w))

    def pad(self, i: int) -> int:
        c, h, w = self.shapes[i]
        if not 1 < h < 9:
            return self.activation(i)
        mode = self.r.choice(["constant", "reflect", "replicate", "circular"])
        return self.emit(Call(F.pad, (1, 1, 1, 1), mode=mode), [i], (c, h + 2, w + 2))

    def squeeze_excite(self, i: int) -> int:
        return self.layer(SqueezeExcite(self.shapes[i][0], self.r.choice([2, 3])), i)

    def shuffle(self, i: int) -> int:
        return self.emit(Shuffle(self.divisor(self.shapes[i][0], 2, 3, 4)), [i], self.shapes[i])

    def pixel_shuffle(self, i: int) -> int:
        c, h, w = self.shapes[i]
        if c % 4 == 0 and h <= 5:
            return self.emit(Call(F.pixel_shuffle, 2), [i], (c // 4, 2 * h, 2 * w))
        if h % 2 == w % 2 == 0 and 4 * c <= LARGEST:
            return self.emit(Call(F.pixel_unshuffle, 2), [i], (4 * c, h // 2, w // 2))
        return self.activation(i)

    def to_tokens(self, i: int) -> int:
        c, h, w = self.shapes[i]
        return self.emit(_tokens, [i], (h * w, c))

    def mean(self, i: int) -> int:
        shape = self.shapes[i]
        return self.emit(_pooled, [i], (shape[0] if len(shape) == 3 else shape[1],))

    def flatten(self, i: int) -> int:
        size = torch.Size(self.shapes[i]).numel()
        if size > 200:
            return self.mean(i)
        return self.emit(Call(torch.flatten, 1), [i], (size,))

    # -- tokens and vectors ----------------------------------------------------------------------------

    def linear(self, i: int, out: int | None = None) -> int:
        *lead, c = self.shapes[i]
        out = out or self.r.choice([4, 6, 8, 12])
        return self.layer(nn.Linear(c, out, self.coin(0.7)), i, (*lead, out))

    def norm_tokens(self, i: int) -> int:
        c = self.shapes[i][-1]
        return self.layer(self.r.choice([nn.LayerNorm, nn.LayerNorm, nn.RMSNorm])(c), i)

    def norm_vector(self, i: int) -> int:
        (c,) = self.shapes[i]
        return self.layer(self.r.choice([nn.BatchNorm1d, nn.LayerNorm])(c), i)

    def attention(self, i: int) -> int:
        _, c = self.shapes[i]
        heads = self.r.choice([1, 2, 4])
        groups = self.divisor(heads, 1, 2, 4)
        kind = self.r.choice([Attention, FusedAttention])
        return self.layer(kind(c, heads, groups, self.r.choice([2, 3, 4]), self.r.choice([c, 6])), i)

    def torch_attention(self, i: int) -> int:
        c = self.shapes[i][1]
        heads = self.divisor(c, 1, 2, 3, 4)
        return self.layer(SelfAttention(nn.MultiheadAttention(c, heads, batch_first=True)), i)

    def gated(self, i: int) -> int:
        c = self.shapes[i][-1]
        return self.layer(SwiGLU(c, self.r.choice([4, 6])), i)

    def softmax(self, i: int) -> int:
        shape = self.shapes[i]
        return self.emit(Call(F.softmax, self.r.choice(range(1, len(shape) + 1))), [i], shape)

    def to_image(self, i: int) -> int:
        t, c = self.shapes[i]
        side = int(t**0.5)
        if side * side != t:
            return self.mean(i)
        return self.emit(Image(side), [i], (c, side, side))

    def recurrent(self, i: int) -> int:
        t, c = self.shapes[i]
        hidden, both = self.r.choice([3, 4]), self.coin()
        kind = self.r.choice([nn.LSTM, nn.GRU, nn.RNN])
        return self.layer(First(kind(c, hidden, batch_first=True, bidirectional=both)), i, (t, hidden * (1 + both)))

    # -- any of them -----------------------------------------------------------------------------------

    def axis(self, i: int) -> int:
        """Where the channels are, batch counted."""
        return 1 if len(self.shapes[i]) == 3 else len(self.shapes[i])

    def resized(self, i: int, width: int) -> Shape:
        shape = list(self.shapes[i])
        shape[self.axis(i) - 1] = width
        return tuple(shape)

    def halves(self, i: int) -> int:
        axis = self.axis(i)
        c = self.shapes[i][axis - 1]
        if c < 3:
            return self.activation(i)
        if c % 2 == 0 and self.coin():
            return self.emit(Call(F.glu, axis), [i], self.resized(i, c // 2))
        if c % 2 == 0 and self.coin():
            return self.emit(Cut(torch.chunk, 2, axis, 2), [i], *[self.resized(i, c // 2)] * 2)
        sizes = [c // 3, c - c // 3]
        return self.emit(Cut(torch.split, sizes, axis, 2), [i], *(self.resized(i, n) for n in sizes))

    def part(self, i: int) -> int:
        """Some channels, by slice, index or roll."""
        axis = self.axis(i)
        c = self.shapes[i][axis - 1]
        start, stop = sorted(self.r.sample(range(c + 1), 2))
        index = torch.tensor([self.r.randrange(c) for _ in range(3)])
        options = [
            (Slice(axis, start, stop), stop - start),
            (Call(torch.index_select, axis, index), 3),
            (Call(torch.roll, 1, axis), c),
            (Call(torch.flip, (axis,)), c),
            (Written(axis, start, stop), c),
        ]
        fn, width = self.r.choice(options)
        return self.emit(fn, [i], self.resized(i, width))

    def scaled(self, i: int) -> int:
        """A parameter of its own times or plus the channels."""
        axis = self.axis(i)
        shape = [1] * len(self.shapes[i])
        shape[axis - 1] = self.shapes[i][axis - 1]
        return self.layer(Scale(shape, self.coin()), i)

    def matching(self, i: int) -> int:
        """A value of the shape of value ``i``."""
        shape, axis = self.shapes[i], self.axis(i) - 1
        same = [j for j, s in enumerate(self.shapes) if s == shape and j not in (i, 0)]
        if same and self.coin(0.7):
            return self.r.choice(same)
        near = [
            j
            for j, s in enumerate(self.shapes)
            if len(s) == len(shape) and all(a == b for k, (a, b) in enumerate(zip(s, shape, strict=True)) if k != axis)
        ]
        j = self.r.choice(near)
        return self.conv(j, out=shape[0], kernel=1) if len(shape) == 3 else self.linear(j, out=shape[-1])

    def combine(self, i: int) -> int:
        j = self.matching(i)
        fn = self.r.choice([torch.add, torch.add, torch.sub, torch.mul, torch.mul, torch.maximum])
        return self.emit(fn, [i, j], self.shapes[i])

    def cat(self, i: int) -> int:
        axis = self.axis(i)
        shape = self.shapes[i]
        near = [
            j
            for j, s in enumerate(self.shapes)
            if j and len(s) == len(shape) and self.resized(j, 1) == self.resized(i, 1)
        ]
        parts = [i, *(self.r.choice(near) for _ in range(self.r.randint(1, 2)))]
        width = sum(self.shapes[j][axis - 1] for j in parts)
        if width > LARGEST:
            return self.activation(i)
        return self.emit(Joined(axis), parts, self.resized(i, width))


_ANY = [
    *(RandomNet.activation, RandomNet.activation, RandomNet.combine, RandomNet.combine, RandomNet.combine),
    *(RandomNet.cat, RandomNet.halves, RandomNet.part, RandomNet.scaled),
]
IMAGE = [
    *(RandomNet.conv, RandomNet.conv, RandomNet.conv, RandomNet.norm_image, RandomNet.norm_image, RandomNet.pool),
    *(RandomNet.transposed, RandomNet.upsample, RandomNet.pad, RandomNet.squeeze_excite, RandomNet.shuffle),
    *(RandomNet.pixel_shuffle, RandomNet.to_tokens, RandomNet.flatten, RandomNet.softmax, *_ANY),
]
TOKENS = [
    *(RandomNet.linear, RandomNet.linear, RandomNet.norm_tokens, RandomNet.attention, RandomNet.attention),
    *(RandomNet.torch_attention, RandomNet.gated, RandomNet.softmax, RandomNet.to_image, RandomNet.recurrent),
    *(RandomNet.mean, RandomNet.flatten, *_ANY),
]
VECTOR = [*(RandomNet.linear, RandomNet.linear, RandomNet.norm_vector, RandomNet.gated, RandomNet.softmax), *_ANY]


# -- modules and functions of the steps -------------------------------------------------------------------


class OverChannels(nn.Module):
    """A norm of the last axis over channels, as in ConvNeXt."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Channels scaled by what a small network makes of their means."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return x * scale[:, :, None, None]


class Attention(nn.Module):
    """Grouped-query attention with three projections."""

    def __init__(self, width: int, heads: int, groups: int, size: int, out: int) -> None:
        super().__init__()
        self.size = size
        self.q = nn.Linear(width, heads * size)
        self.k, self.v = nn.Linear(width, groups * size), nn.Linear(width, groups * size)
        self.out = nn.Linear(heads * size, width)
        self.repeats = heads // groups

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (p(x).view(n, t, -1, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (y.repeat_interleave(self.repeats, 1) for y in (k, v))
        scores = (q @ k.transpose(-1, -2)) * 0.4
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))


class FusedAttention(nn.Module):
    """Attention with one projection for queries, keys and values, and torch's own kernel."""

    def __init__(self, width: int, heads: int, groups: int, size: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (y.view(n, t, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` over one input."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


class First(nn.Module):
    """The first result of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x)[0]
        return result


class SwiGLU(nn.Module):
    """A gated pair of linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Scale(nn.Module):
    """A raw parameter that multiplies or adds."""

    def __init__(self, shape: Sequence[int], multiplies: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(*shape))
        self.multiplies = multiplies

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if self.multiplies else x + self.scale


class Call:
    """A function with its other arguments."""

    def __init__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.fn, self.args, self.kwargs = fn, args, kwargs

    def __call__(self, x: Tensor) -> Any:
        return self.fn(x, *self.args, **self.kwargs)

    def __repr__(self) -> str:
        return f"{self.fn.__name__}{self.args}{self.kwargs or ''}"


class Cut(Call):
    """A function of several results."""

    def __init__(self, fn: Callable[..., Any], size: Any, axis: int, parts: int) -> None:
        super().__init__(fn, size, axis)
        self.parts = parts


@dataclass
class Slice:
    """Some channels."""

    axis: int
    start: int
    stop: int

    def __call__(self, x: Tensor) -> Tensor:
        return x[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


@dataclass
class Written:
    """Some channels doubled in place."""

    axis: int
    start: int
    stop: int

    def __call__(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[(slice(None),) * self.axis + (slice(self.start, self.stop),)] *= 2
        return x


@dataclass
class Joined:
    """Channels side by side."""

    axis: int

    def __call__(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, self.axis)


@dataclass
class Image:
    """Tokens as the pixels of a square."""

    side: int

    def __call__(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], -1, self.side, self.side)


@dataclass
class Shuffle:
    """Channels of several groups interleaved."""

    groups: int

    def __call__(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _apply(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module(x)
    return result


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x


# -- masks ------------------------------------------------------------------------------------------------


def random_masks(model: nn.Module, r: random.Random) -> dict[str, Tensor]:
    """Rows, columns or scattered elements of some parameters: the same of each width, others in each, or all."""
    generator = torch.Generator().manual_seed(r.getrandbits(32))
    shared: dict[int, Tensor] = {}
    masks: dict[str, Tensor] = {}

    def kept(n: int, together: bool) -> Tensor:
        keep = torch.rand(n, generator=generator) >= r.choice([0.25, 0.5, 0.8])
        keep[int(torch.randint(n, (), generator=generator))] |= not keep.any()
        return shared.setdefault(n, keep) if together else keep

    masked_share, together = r.choice([0.3, 0.6, 0.9]), r.choice([0.0, 0.5, 1.0])
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        if name in masks or r.random() > masked_share or name.startswith("head."):
            continue
        kind = r.choice(["rows", "rows", "rows", "rows", "columns", "scattered", "all"]) if p.ndim > 1 else "rows"
        if kind == "all" and r.random() < 0.5:
            masks[name] = torch.zeros(p.shape)
        elif kind in ("scattered", "all"):
            masks[name] = (torch.rand(p.shape, generator=generator) >= 0.5).double()
        else:
            axis = 1 if kind == "columns" else 0
            keep = kept(p.shape[axis], r.random() < together).double()
            masks[name] = keep.reshape([-1 if d == axis else 1 for d in range(p.ndim)])
            bias = name.removesuffix("weight") + "bias"
            if (
                axis == 0
                and bias != name
                and bias in parameters
                and len(parameters[bias]) == len(keep)
                and r.random() < 0.6
            ):
                masks[bias] = keep.clone()
    return masks
