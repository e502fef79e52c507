"""Convolutions.

Algebra, over the input channels of each group, with the pattern ``nz(w)[o, i]`` of a kernel that is not all zero:

* an output of a sample is known where every input that it may read is a known constant (zero, at padded borders);
* ``needed(x)[i] = any_o needed(y)[o] & nz(w)[o, i]``;
* a channel may leave where no needed output reads it, where it is a known zero, or where it is a known constant
  that a bias or a carrier channel can stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Contraction, Coupling, Labels, moved
from maskprop.infer.facts import Fact, all_over, any_over, bool_matmul, everywhere
from maskprop.infer.op import Op
from maskprop.infer.places import bias_place, calls_alike, weight_place
from maskprop.infer.rules.registry import Rule, evaluate, register

aten = torch.ops.aten


@register(aten.convolution.default)
class Convolution(Rule):
    """Convolutions of any number of axes, grouped, dilated, padded, transposed.

    A constant input gives a constant output only where every position sees the whole kernel: without padding, or
    where the constant is zero. A transposed convolution shows every position the whole kernel only with kernel 1.
    """

    def _layout(self, op: Op) -> tuple[int, bool, bool]:
        """Groups, whether transposed, whether borders see less than the whole kernel."""
        transposed = bool(op.arg("transposed"))
        kernel, padding, stride = op.shapes[1][2:], op.arg("padding"), op.arg("stride")
        ragged = any(p > 0 for p in padding)
        if transposed:
            ragged = (
                ragged
                or any(k > 1 for k in kernel)
                or any(s > 1 for s in stride)
                or any(p > 0 for p in op.arg("output_padding"))
            )
        return int(op.arg("groups")), transposed, ragged

    def _pattern(self, weight: Fact, op: Op) -> Tensor:
        """(G, O, I): whether an output reads an input of its group; axes may have size 1."""
        fact, found = op.memo.get("pattern", (None, None))
        if fact is not weight:
            groups, transposed, _ = self._layout(op)
            nz = ~weight.zero
            nz = any_over(nz, range(2, nz.ndim)).reshape(nz.shape[:2])
            first = nz.shape[0] if nz.shape[0] == 1 else groups
            cut = nz.reshape(first, -1, nz.shape[1])
            found = cut.transpose(1, 2) if transposed else cut
            op.memo["pattern"] = weight, found
        assert isinstance(found, Tensor)
        return found

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        x, weight = facts[0], facts[1]
        ndim = len(op.shape)
        groups, transposed, ragged = self._layout(op)
        if all(f.plain for f in facts) or (all(f.total for f in facts) and not bool(channel_constant(x)[ragged].all())):
            result = evaluate(op, facts)
            assert isinstance(result, Fact)
            return result
        if not weight.total:
            return Fact.unknown(ndim)
        nz = self._pattern(weight, op)
        space = tuple(range(2, ndim))
        seen, zero = (where.flatten(1) for where in constant_over(x, space))
        unknown = self._any_input(nz, self._by_group(~(zero if ragged else seen), groups))
        outputs, samples = op.shape[1], unknown.shape[0]
        known = (~unknown).expand(samples, groups, -1)
        known = known.expand(-1, -1, outputs // groups if known.shape[2] == 1 else -1).reshape(samples, -1)
        if not bool(known.any()):
            return Fact.unknown(ndim)
        shape = (-1, outputs) + (1,) * len(space)
        nonzero = not ragged and bool((seen & ~zero).any())
        if not nonzero and len(facts) == 2:
            return Fact.zeros(known.reshape(shape))
        value = torch.zeros(1, outputs, dtype=torch.float64)
        if nonzero:
            constants = torch.where(seen & ~zero, x.value().flatten(2)[..., 0], 0.0)
            constants = constants.expand(-1, op.shapes[0][1]).reshape(constants.shape[0], groups, 1, -1)
            kernel = weight.value().expand(op.shapes[1]).flatten(2).sum(-1)
            kernel = kernel.reshape(groups, -1, kernel.shape[1])
            kernel = kernel.transpose(1, 2) if transposed else kernel
            value = (kernel * constants).sum(-1).flatten(1)
        if len(facts) > 2:
            known = known & facts[2].known.expand(outputs)
            value = value + facts[2].value().expand(outputs)
        return Fact.of_value(value.reshape(shape), known.reshape(shape))

    @staticmethod
    def _by_group(channels: Tensor, groups: int) -> Tensor:
        """(N, G, I) from (N, C); axes may have size 1."""
        return channels.unsqueeze(-1) if channels.shape[-1] == 1 else channels.unflatten(-1, (groups, -1))

    @staticmethod
    def _any_input(nz: Tensor, inputs: Tensor) -> Tensor:
        """(N, G, O) from (G, O, I) and (N, G, I): ``any_i nz & inputs``."""
        return bool_matmul(nz, inputs.unsqueeze(-1)).squeeze(-1)

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        x, ndim = self._read_inputs(op, facts[1], needed[0]), len(op.shape)
        some = everywhere(bool(needed[0].any()), ndim)
        found = [x.reshape((*x.shape,) + (1,) * (ndim - 2)), some]
        return found if len(facts) == 2 else [*found, any_over(needed[0], [0, *range(2, ndim)]).reshape(-1)]

    def _read_inputs(self, op: Op, weight: Fact, needed: Tensor) -> Tensor:
        """(N, C) or (N, 1): which inputs some of these outputs read."""
        *same, found = op.memo.get("read", (None, None, None))
        if same[0] is not weight or same[1] is not needed:
            groups = self._layout(op)[0]
            outputs = self._by_group(any_over(needed, range(2, needed.ndim)).flatten(1), groups)
            found = bool_matmul(outputs.unsqueeze(-2), self._pattern(weight, op)).squeeze(-2)  # (N, G, I)
            if found.shape[1:].numel() > 1:
                found = found.expand(-1, groups, op.shapes[0][1] // groups)
            found = found.flatten(1)
            op.memo["read"] = weight, needed, found
        assert isinstance(found, Tensor)
        return found

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        groups, transposed, ragged = self._layout(op)
        x, w = labels[0], labels[1]
        ndim = len(op.shape)
        for axis in range(2, ndim):
            c.pin(x[axis], "is a spatial axis of a convolution")
            c.pin(w[axis], "is a kernel axis of a convolution")
        channels = c.uniform(x[1], [0, *range(2, ndim)])
        out_axis, in_axis = (1, 0) if transposed else (0, 1)
        if groups == 1:
            rows = c.uniform(w[out_axis], [in_axis])
            c.bind(op.inputs[1], in_axis, moved(channels, lambda a: a.reshape((1,) * in_axis + (-1,))))
            out = None if rows is None else rows.reshape(-1)
        else:
            out = self._couple_groups(op, channels, c, groups, transposed)
        if channels is not None:
            self._terminate(op, channels.reshape(-1), c, groups, ragged)
        if len(labels) > 2 and (out is not None or labels[2][0] is not None):
            c.bind(op.inputs[2], 0, out)
        result: Labels = [
            x[0] if x[0] is None else c.uniform(x[0], range(1, ndim)),
            None,
            *[None] * (ndim - 2),
        ]
        result[1] = None if out is None else out.reshape((1, -1) + (1,) * (ndim - 2))
        return result

    def _couple_groups(
        self, op: Op, channels: Tensor | None, c: Coupling, groups: int, transposed: bool
    ) -> Tensor | None:
        """Input (G, I) and output (G, O) share their outer axis; the weight's inner axis is ragged over the groups."""
        weight = op.inputs[1]
        inputs, outputs = op.shapes[0][1] // groups, op.shape[1] // groups
        outer_in, inner_in = split_rows(channels, groups, inputs, c)
        if not transposed:
            rows = c.labels_of(weight)[0]
            rows = None if rows is None else c.uniform(rows, range(1, rows.ndim))
            flat = None if rows is None else rows.reshape(-1)
            outer_out, _ = split_rows(flat, groups, outputs, c)
            if outer_in is not None or outer_out is not None:
                c.equal(outer_in, outer_out)
            if inputs > 1:
                ragged = None if inner_in is None else inner_in.repeat_interleave(outputs, 0)
                c.bind(weight, 1, ragged)
            return flat
        # weight (G*I, O, ...): its rows are the input channels, its columns the ragged inner of the outputs
        rows = c.labels_of(weight)[0]
        flat_in = None if channels is None else channels.reshape(-1)
        if rows is not None or flat_in is not None:
            c.equal(flat_in, None if rows is None else c.uniform(rows, range(1, rows.ndim)).reshape(-1))  # type: ignore[union-attr]
        if flat_in is None:
            c.pin_all(c.labels_of(weight), "belongs to a grouped transposed convolution of fixed input")
            return None
        out = c.fresh([op.shape[1]])
        outer_out, inner_out = split_rows(out, groups, outputs, c)
        c.equal(outer_in, outer_out)
        if outputs > 1:
            assert inner_out is not None
            c.bind(weight, 1, inner_out.repeat_interleave(inputs, 0))
        return out

    def _terminate(self, op: Op, labels: Tensor, c: Coupling, groups: int, ragged: bool) -> None:
        channels, (x, weight) = op.shapes[0][1], c.facts_of(op)[:2]
        live = self._read(op, c) & ~all_over(x.zero, [0, *range(2, x.zero.ndim)]).reshape(-1).expand(channels)
        constants = live & all_over(x.known, [0, *range(2, x.known.ndim)]).reshape(-1)
        if c.constants == "drop":
            live = live & ~constants
        elif weight.total and not x.total and bool(constants.any()):
            constant, foldable = unit_constants(x, live, channels, groups, ragged)
            foldable = same_in_all_calls(op, constant, foldable, lambda one: self._seen(one, c))
            carrier = ragged or constant.ndim > 1
            weight_at = weight_place(op.inputs[1], len(calls_alike(op.node)))
            kind = "bias" if not carrier and bias_place(op.node) else ("carrier" if weight_at else None)
            if c.constants == "fold" and kind == "carrier" and bias_place(op.node):
                kind = "bias"
            if kind == "carrier" and not ragged and groups == 1 and bias_place(op.node):
                offset = unit_constants(x, live, channels, groups, ragged, besides=True)[1]
                offset = same_in_all_calls(op, constant, offset, lambda one: self._seen(one, c))
                kind, foldable = ("both", offset) if bool((offset & ~foldable).any()) else (kind, foldable)
            if kind is not None and bool(foldable.any()):
                c.leave(Contraction(op, labels, constant, foldable, kind, groups))
                live = live & ~foldable
        c.end(labels, live, "is read here")

    def _read(self, op: Op, c: Coupling) -> Tensor:
        """(C,): which channels a needed output reads."""
        read = self._read_inputs(op, c.facts_of(op)[1], c.needed_of(op))
        return any_over(read, [0])[0].expand(op.shapes[0][1])

    def _seen(self, op: Op, c: Coupling) -> tuple[Tensor, Tensor, Tensor]:
        """Which channels a call reads, their constants, and where they are known."""
        groups, _, ragged = self._layout(op)
        read = self._read(op, c)
        return read, *unit_constants(c.facts_of(op)[0], read, len(read), groups, ragged)


def constant_over(x: Fact, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where a value is one known number all along the axes, and where that is zero; with size 1 there."""
    zero = all_over(x.zero, axes)
    if x.nothing:
        return zero, zero
    known = all_over(x.known, axes)
    if bool(known.any()) and any(x.value().shape[d] > 1 for d in axes):
        v = x.value()
        known = known & (v.amax(axes, keepdim=True) == v.amin(axes, keepdim=True))
    return known, zero


def channel_constant(x: Fact) -> tuple[Tensor, Tensor]:
    """(C or 1,): channels that are one known number at every position, and those where it is zero."""
    known, zero = constant_over(x, (0, *range(2, x.known.ndim)))
    return known.reshape(-1), zero.reshape(-1)


def channel_value(x: Fact) -> Tensor:
    """(C or 1,): the number of each channel that is one, see :func:`channel_constant`."""
    v = x.value()
    return v.reshape(-1) if v.numel() == v.shape[1] else v.movedim(1, 0).reshape(v.shape[1], -1)[:, 0]


def unit_constants(
    x: Fact, live: Tensor, channels: int, groups: int, ragged: bool, besides: bool = False
) -> tuple[Tensor, Tensor]:
    """Each channel's constant, and whether it can be stood for: uniform, or in proportion to one map a group.

    A complex one cannot be. ``besides``: in proportion up to an added number.
    """
    if not x.nothing and x.value().is_complex():
        return torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.bool)
    seen, _ = channel_constant(x)
    uniform = seen.expand(channels) & live
    others = [0, *range(2, x.known.ndim)]
    varied = not x.nothing and any(t.shape[d] > 1 for t in (x.known, x.value()) for d in others)
    mapped = all_over(x.known, others).reshape(-1).expand(channels) & live if varied else uniform
    if not varied or not bool((mapped & ~uniform).any()):
        if not bool(uniform.any()):
            return torch.zeros(channels, dtype=torch.float64), uniform
        return torch.where(uniform, channel_value(x).expand(channels), 0.0), uniform
    v = x.value()
    maps = v.expand(v.shape[0], channels, *v.shape[2:]).transpose(0, 1).reshape(channels, -1)
    maps = torch.where(mapped[:, None], maps, 0.0)
    foldable = mapped.clone()
    for part in range(groups):
        rows = slice(part * channels // groups, (part + 1) * channels // groups)
        block = maps[rows] - maps[rows].mean(1, keepdim=True) if besides else maps[rows]
        if not bool(mapped[rows].any()):
            continue
        base = block[block.square().sum(1).argmax()]
        scale = block @ base / base.square().sum().clamp_min(1e-300)
        error = (block - scale[:, None] * base).abs().amax(1)
        foldable[rows] &= error <= 1e-12 * maps[rows].abs().amax(1).clamp_min(1e-300)
    return maps, foldable


def same_in_all_calls(
    op: Op, constant: Tensor, foldable: Tensor, seen: Callable[[Op], tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """Those of the units that could go whose constant every call of the same weight sees that reads them.

    ``seen``: of a call, which units it reads, their constants, and where they are known.
    """
    for node in calls_alike(op.node):
        if node is not op.node and bool(foldable.any()):
            read, other, known = seen(Op(node))
            if constant.ndim > 1 or other.ndim > 1:
                return torch.zeros_like(foldable)
            foldable = foldable & (~read | (known & torch.isclose(other, constant, rtol=1e-12, atol=0.0)))
    return foldable


def split_rows(rows: Tensor | None, groups: int, size: int, c: Coupling) -> tuple[Tensor | None, Tensor | None]:
    """A labelled axis as (groups, size): outer (G,) and inner (G, size) labels."""
    if rows is None:
        return None, None
    if size == 1:
        return rows.reshape(-1), None
    rows = rows.reshape(groups, size)
    outer, inner = c.fresh([groups, 1]), c.fresh([groups, size])
    c.triple(rows, outer, inner, (groups, size))
    c.regular([outer, inner], 1)
    return outer.reshape(-1), inner
