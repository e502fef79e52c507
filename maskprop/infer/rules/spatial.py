"""Ops over the spatial axes of each channel: pooling, interpolation, padding, im2col.

Algebra: channels do not mix. A channel that is one known number at every position stays so (under an average that
counts zero padding only if the number is zero; otherwise it becomes a known map, found by running the op).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels
from maskprop.infer.facts import Fact, all_over, any_over, as_double, broadcast_shape, spread
from maskprop.infer.op import Op
from maskprop.infer.rules.registry import EAGER_LIMIT, Rule, evaluate, register, unknowns

aten = torch.ops.aten


@register(
    aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default, aten.max_pool2d.default,
        aten.max_pool1d.default, aten.max_pool3d.default,
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default,
    aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default, aten.adaptive_max_pool2d.default,
        aten.adaptive_max_pool3d.default,
    aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_nearest3d.default,
        aten._upsample_nearest_exact2d.default,
    aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default, aten.upsample_linear1d.default,
        aten.upsample_trilinear3d.default,
    aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default,
    aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default,
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default,
)  # fmt: skip
class PerChannel(Rule):
    """Every axis but the spatial ones passes through."""

    def space(self, op: Op) -> list[int]:
        """The axes along which the op mixes."""
        shape, out = op.shapes[0], op.results[0]
        assert out is not None
        name = op.target._schema.name
        count = next((n for n in (1, 2, 3) if f"{n}d" in name), 1)
        return list(range(len(shape) - count, len(shape)))

    def _keeps_constants(self, op: Op) -> bool:
        padding = op.arg("padding", [0])
        padded = any(p > 0 for p in (padding if isinstance(padding, (list, tuple)) else [padding]))
        uneven = op.arg("ceil_mode", False) or op.arg("divisor_override") is not None
        return "avg_pool" not in op.target._schema.name or not (
            (padded and op.arg("count_include_pad", True)) or uneven
        )

    def _keeps(self, op: Op, value: Tensor, known: Tensor) -> bool:
        """Whether these uniform known numbers come out as they went in."""
        return self._keeps_constants(op) or bool((~known | (value == 0)).all())

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        fact, space = facts[0], self.space(op)
        if fact.plain and not (_is_adaptive(op) and bool(varies(fact.value(), space).any())):
            return evaluate(op, facts)
        first = self._first(op, fact, space)
        return (first, *unknowns(op)[1:]) if op.several else first

    def _first(self, op: Op, fact: Fact, space: list[int]) -> Fact:
        known = all_over(fact.known, space)
        if _is_adaptive(op) and not fact.nothing:
            # what varies by the distance to the borders is another number for an image of another size
            known = known & ~varies(fact.value(), space)
        if not bool(known.any()):
            return Fact.unknown(known.ndim)
        value = fact.value()
        uniform = all(value.shape[d] == 1 for d in space)
        if uniform and self._keeps(op, value, known):
            return Fact.of_value(value, known.expand(broadcast_shape(known.shape, value.shape)))
        meta = op.results[0]
        assert meta is not None
        if torch.Size(meta.shape).numel() // meta.shape[0] > EAGER_LIMIT:
            return Fact.unknown(known.ndim)
        result = self._run(op, value, space, op.shapes[0])
        if uniform:
            # on a small dummy input a map may happen to be uniform, which says nothing of larger ones
            larger = self._run(op, value, space, [n + 8 if d in space else n for d, n in enumerate(op.shapes[0])])
            known = known & (varies(result, space) | ~varies(larger, space))
        else:  # and a map may vary where a small one does not
            known = known & (varies(result, space) | ~varies(value, space))
        return Fact.of_value(result, known)

    @staticmethod
    def _run(op: Op, value: Tensor, space: list[int], shape: Sequence[int]) -> Tensor:
        """The op on a known value, spread over a space of this shape."""
        result = op.run(spread(value, space, shape).contiguous())
        return as_double(result[0] if isinstance(result, tuple) else result)

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        total = needed[0]
        for other in needed[1:]:
            total = total | other
        return [any_over(total, self.space(op))]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels | tuple[Labels, ...]:
        space = self.space(op)
        out = list(labels[0])
        for d in space:
            c.pin(out[d], "is a spatial axis")
            out[d] = None
        out = [c.uniform(a, [d for d in space if d != i]) for i, a in enumerate(out)]
        return tuple(list(out) for _ in op.results) if op.several else out


def _is_adaptive(op: Op) -> bool:
    return "adaptive" in op.target._schema.name


def varies(value: Tensor, space: Sequence[int]) -> Tensor:
    """Whether a value varies over these axes, kept as size 1."""
    axes = [d for d in space if value.shape[d] > 1]
    if not axes:
        return torch.zeros((1,) * value.ndim, dtype=torch.bool)
    value = value if value.is_floating_point() else value.abs().double() if value.is_complex() else value.double()
    low, high = value.amin(axes, keepdim=True), value.amax(axes, keepdim=True)
    return (high - low) > 1e-12 * torch.maximum(high.abs(), low.abs())


@register(aten.constant_pad_nd.default)
class ConstantPad(PerChannel):
    """Padding with one number: a channel that is that number stays uniform, another becomes a known map."""

    def space(self, op: Op) -> list[int]:
        pad, ndim = op.arg("pad"), len(op.shapes[0])
        return [ndim - 1 - i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1]]

    def _keeps(self, op: Op, value: Tensor, known: Tensor) -> bool:
        return bool((~known | (value == op.arg("value", 0))).all())


@register(
    aten.grid_sampler_2d.default, aten.grid_sampler_3d.default, aten.max_unpool2d.default, aten.max_unpool3d.default,
)  # fmt: skip
class Resample(Rule):
    """Positions of each channel read or written where another input says: a channel of zeros stays one."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        if all(f.total for f in facts):
            return evaluate(op, facts)
        return Fact.zeros(all_over(facts[0].zero, range(2, len(op.shape))))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        y = any_over(needed[0], range(2, needed[0].ndim))
        if "unpool" in op.target._schema.name:  # each channel has positions of its own
            return [y, y]
        return [y, torch.full((1,) * len(op.shapes[1]), bool(y.any()))]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        space = range(2, len(op.shape))
        for given in labels:
            for d in space:
                c.pin(given[d], "is a spatial axis")
        batch, channels = (
            c.uniform(a, [d for d in range(len(op.shape)) if d != i]) for i, a in enumerate(labels[0][:2])
        )
        batch = c.equal(batch, labels[1][0]) if batch is not None or labels[1][0] is not None else None
        if "unpool" in op.target._schema.name:
            channels = c.equal(channels, labels[1][1])
        else:
            c.pin(labels[1][1], "is a spatial axis")
        return [batch, channels, *(None for _ in space)]


@register(aten.unfold.default)
class Windows(Rule):
    """``x.unfold(dim, size, step)``: the axis becomes one of windows, and a new last one runs inside each."""

    def _dim(self, op: Op) -> int:
        return int(op.arg("dimension")) % len(op.shapes[0])

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        fact, dim = facts[0], self._dim(op)
        if fact.nothing:
            return Fact.unknown(len(op.shape))

        def cut(t: Tensor) -> Tensor:
            varies = t.shape[dim] > 1
            return t.unfold(dim, op.arg("size"), op.arg("step")) if varies else t.unsqueeze(-1)

        return fact.map(cut)

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        return [any_over(needed[0], [self._dim(op), len(op.shape) - 1]).squeeze(-1)]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        dim, x = self._dim(op), labels[0]
        c.pin(x[dim], "is cut into windows")
        passing = [None if d == dim else c.uniform(a, [dim]) for d, a in enumerate(x)]
        return [*(None if a is None else a.unsqueeze(-1) for a in passing), None]


@register(aten.im2col.default)
class Im2col(Rule):
    """``(N, C, H, W) -> (N, C * kh * kw, L)``: each channel becomes a run of kh * kw rows."""

    def _run(self, op: Op) -> int:
        kh, kw = op.arg("kernel_size")
        return int(kh * kw)

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        zero = all_over(facts[0].zero, [2, 3])
        if not bool(zero.any()):
            return Fact.unknown(3)
        rows = (
            zero.expand(zero.shape[0], op.shapes[0][1], 1, 1)
            .reshape(zero.shape[0], -1, 1)
            .repeat_interleave(self._run(op), 1)
        )
        return Fact(rows, rows, torch.zeros(1, 1, 1, dtype=torch.float64))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        y = any_over(needed[0], [2])
        if y.shape[1] == 1:
            return [y.unsqueeze(-1)]
        return [y.reshape(y.shape[0], -1, self._run(op)).any(-1)[..., None, None]]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        x = labels[0]
        for d in (2, 3):
            c.pin(x[d], "is a spatial axis")
        channels = c.uniform(x[1], [0, 2, 3])
        rows = None if channels is None else channels.reshape(1, -1, 1).repeat_interleave(self._run(op), 1)
        return [None if x[0] is None else c.uniform(x[0], [1, 2, 3]).squeeze(-1), rows, None]  # type: ignore[union-attr]


@register(aten.col2im.default)
class Col2im(Rule):
    """The reverse of im2col, overlaps summed: ``(N, C * kh * kw, L) -> (N, C, H, W)``."""

    def _run(self, op: Op) -> int:
        kh, kw = op.arg("kernel_size")
        return int(kh * kw)

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        zero = all_over(facts[0].zero, [2])
        if zero.shape[1] == 1 or not bool(zero.any()):
            return (
                Fact.unknown(4)
                if not bool(zero.all())
                else Fact(zero[..., None], zero[..., None], torch.zeros(1, 1, 1, 1, dtype=torch.float64))
            )
        channel = zero.reshape(zero.shape[0], -1, self._run(op)).all(-1)[..., None, None]
        return Fact(channel, channel, torch.zeros(1, 1, 1, 1, dtype=torch.float64))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        y = any_over(needed[0], [2, 3]).squeeze(-1)
        return [y if y.shape[1] == 1 else y.repeat_interleave(self._run(op), 1)]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        x = labels[0]
        c.pin(x[2], "is a spatial axis")
        batch, rows = c.uniform(x[0], [1, 2]), c.uniform(x[1], [0, 2])
        batch = None if batch is None else batch.unsqueeze(-1)
        if rows is None:
            return [batch, None, None, None]
        runs = rows.reshape(-1, self._run(op))
        c.equal(runs, runs[:, :1])
        return [batch, runs[:, 0].reshape(1, -1, 1, 1), None, None]
