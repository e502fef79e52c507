"""Normalisations and softmax.

Algebra: a channel whose affine weight is a known zero comes out as its bias, whatever went in. Batch norm in
evaluation mode is pointwise over channels. Group and layer norm take statistics over units: those units leave
together or not at all.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from maskprop.infer.coupling import Count, Coupling, Labels, moved
from maskprop.infer.facts import Fact, all_over, any_over, as_double, lead, reduce_to, spread, squash
from maskprop.infer.op import Op
from maskprop.infer.places import ScalePlace
from maskprop.infer.rules.convolution import channel_constant, channel_value, split_rows
from maskprop.infer.rules.extent import own_axes
from maskprop.infer.rules.registry import EAGER_LIMIT, Rule, evaluate, register, unknowns

aten = torch.ops.aten


def _affine(op: Op, facts: Sequence[Fact], name: str) -> Fact | None:
    position = op.position(name)
    return None if position is None else facts[position]


def _on_channels(t: Tensor, ndim: int) -> Tensor:
    """A vector over axis 1."""
    return t.reshape((1, -1) + (1,) * (ndim - 2))


@register(
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.cudnn_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats,
)
class BatchNorm(Rule):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over axis 1."""

    def _on_batch(self, op: Op) -> bool:
        """Whether the statistics are the batch's own."""
        return bool(op.arg("training", False)) or op.position("running_mean") is None

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        x, weight, bias = facts[0], _affine(op, facts, "weight"), _affine(op, facts, "bias")
        if all(f.plain for f in facts):
            return evaluate(op, facts)
        ndim = len(op.shapes[0])
        seen, _ = channel_constant(x)
        if all(f.total for f in facts) and not bool(seen.all()):  # maps that vary by the distance to the borders
            return evaluate(op, facts)
        known = seen if weight is None or weight.plain else seen | weight.zero
        if not bool(known.any()):
            return Fact.unknown(ndim), *unknowns(op)[1:]
        scaled = seen if known is seen or weight is None else seen & ~weight.zero
        varied = known is seen or bool(scaled.any())
        if not varied and (bias is None or not bool((known & ~bias.zero).any())):
            return Fact.zeros(_on_channels(known, ndim)), *unknowns(op)[1:]
        value = torch.zeros(1, dtype=torch.float64)
        mean, var = _affine(op, facts, "running_mean"), _affine(op, facts, "running_var")
        if varied and mean is not None and var is not None and not self._on_batch(op):
            value = (channel_value(x) - mean.value()) * torch.rsqrt(var.value() + op.arg("eps"))
            value = value if weight is None else value * weight.value()
            value = value if known is seen else torch.where(scaled, value, 0.0)
        if bias is not None:
            value = value + bias.value()
        known = known.expand_as(value) if known.numel() < value.numel() else known
        return Fact.of_value(_on_channels(value, ndim), _on_channels(known, ndim)), *unknowns(op)[1:]

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        if _any(needed[1:]):
            return super().needed(op, facts, needed)
        y = needed[0]
        others = [0, *range(2, y.ndim)]
        weight = _affine(op, facts, "weight")
        x = y if weight is None else y & ~_on_channels(weight.zero, y.ndim)
        return [any_over(x, others) if self._on_batch(op) else x] + [any_over(y, others).reshape(-1)] * (len(facts) - 1)

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> tuple[Labels, ...]:
        out = list(labels[0])
        if self._on_batch(op):
            for axis in (0, *range(2, len(out))):
                c.pin(out[axis], "is normalised over")
                out[axis] = None
        out = [a if i == 1 else c.uniform(a, [1]) for i, a in enumerate(out)]
        flat = moved(c.uniform(out[1], [0, *range(2, len(out))]), lambda a: a.reshape(-1))
        for node in op.inputs[1:]:
            c.bind(node, 0, flat)
        out[1] = moved(flat, lambda a: _on_channels(a, len(out)))
        rest: list[Labels] = [
            [flat] if m is not None and m.shape == op.shapes[0][1:2] else [None] for m in op.results[1:]
        ]
        return out, *rest


@register(aten.native_group_norm.default)
class GroupNorm(Rule):
    """Statistics over a group's channels and space: a group leaves whole or stays whole."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        if all(f.plain for f in facts):
            return evaluate(op, facts)
        ndim, count, groups = len(op.shapes[0]), op.shapes[0][1], op.arg("group")
        affine = _affine_only(op, facts, ndim).map(lambda t: _on_channels(t, ndim))
        whole = all_over(facts[0].known, [0, *range(2, ndim)]).expand(1, count, *[1] * (ndim - 2)).reshape(groups, -1)
        known = _on_channels(whole.all(1, keepdim=True).expand_as(whole).reshape(-1), ndim)
        return _normalised(op, facts, known, range(ndim), affine), *unknowns(op)[1:]

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        if _any(needed[1:]):
            return super().needed(op, facts, needed)
        y = needed[0]
        channels = any_over(y, [0, *range(2, y.ndim)]).reshape(-1)
        weight = _affine(op, facts, "weight")
        live = channels if weight is None else channels & ~weight.zero
        count, groups = op.shapes[0][1], op.arg("group")
        live = live.expand(count).reshape(groups, -1).any(1, keepdim=True).expand(-1, count // groups)
        return [_on_channels(live, y.ndim)] + [channels] * (len(facts) - 1)

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> tuple[Labels, ...]:
        out = list(labels[0])
        ndim, groups = len(out), op.arg("group")
        for axis in range(2, ndim):
            c.pin(out[axis], "is a spatial axis of a group norm")
            out[axis] = None
        out[0] = c.uniform(out[0], range(1, ndim))
        flat = moved(c.uniform(out[1], [0, *range(2, ndim)]), lambda a: a.reshape(-1))
        outer, inner = split_rows(flat, groups, op.shapes[0][1] // groups, c)
        c.pin(inner, "shares a group's statistics")
        if outer is not None:
            c.counts.append(Count(op.node, 6, outer.reshape(-1)))
        for node in op.inputs[1:]:
            c.bind(node, 0, flat)
        out[1] = moved(flat, lambda a: _on_channels(a, ndim))
        statistics = [moved(out[0], lambda a: a.reshape(-1, 1)), moved(outer, lambda a: a.reshape(1, -1))]
        return out, statistics, list(statistics)


def _affine_only(op: Op, facts: Sequence[Fact], ndim: int) -> Fact:
    """The affine part of a norm: units with a zero weight come out as the bias, whatever went in."""
    weight, bias = _affine(op, facts, "weight"), _affine(op, facts, "bias")
    if weight is None or not bool(weight.zero.any()):
        return Fact.unknown(ndim)
    if bias is None:
        return Fact.zeros(weight.zero)
    return Fact.of_value(bias.value(), weight.zero)


def _normalised(op: Op, facts: Sequence[Fact], known: Tensor, axes: Sequence[int], affine: Fact) -> Fact:
    """What is known of the result: where all that a statistic is taken over is known, or by the affine alone.

    Args:
        op: the norm.
        facts: of its inputs.
        known: where the first result is known for the first reason.
        axes: that the op needs at full size to be run.
        affine: what is known for the other reason.
    """
    x, *others = facts
    size = torch.Size(n if d in axes else 1 for d, n in enumerate(op.shapes[0])).numel()
    if not bool(known.any()) or not all(f.total for f in others) or size > EAGER_LIMIT:
        return affine
    full = spread(x.value(), axes, op.shapes[0]).contiguous()
    result = op.run(full, *(f.value().expand(s) for f, s in zip(others, op.shapes[1:], strict=True)))[0]
    value = torch.where(known, as_double(result), affine.value())
    either = known | affine.known
    return Fact.of_value(squash(torch.where(either, value, 0.0)), either)


def _any(needed: Sequence[Tensor]) -> bool:
    return any(bool(n.any()) for n in needed)


@register(aten.native_layer_norm.default)
class LayerNorm(Rule):
    """Statistics over the last axes, all of whose units stay."""

    def _axes(self, op: Op) -> list[int]:
        ndim = len(op.shapes[0])
        return list(range(ndim - len(op.arg("normalized_shape")), ndim))

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        if all(f.plain for f in facts):
            return evaluate(op, facts)
        ndim = len(op.shapes[0])
        affine = _affine_only(op, facts, ndim).map(lambda t: lead(t, ndim))
        known = all_over(facts[0].known, self._axes(op))
        return _normalised(op, facts, known, self._axes(op), affine), *unknowns(op)[1:]

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        if _any(needed[1:]):
            return super().needed(op, facts, needed)
        y = needed[0]
        weight = _affine(op, facts, "weight")
        live = y if weight is None else y & ~weight.zero
        return [any_over(live, self._axes(op))] + [reduce_to(y, shape) for shape in op.shapes[1:]]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> tuple[Labels, ...]:
        out, axes = list(labels[0]), self._axes(op)
        for i, axis in enumerate(axes):
            c.pin(out[axis], "is normalised over")
            out[axis] = None
            for other in labels[1:]:
                c.pin(other[i], "is normalised over")
        out = [c.uniform(a, [d for d in axes if d != axis]) for axis, a in enumerate(out)]
        return tuple(list(out) for _ in op.results)


@register(aten._fused_rms_norm.default)
class RMSNorm(LayerNorm):
    """``x / sqrt(mean(x**2) + eps) * weight``.

    Zero stays zero, and zeros may leave: with C units kept as C', ``eps`` times ``C / C'`` and the weight times
    ``sqrt(C / C')`` give the same.
    """

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        found = super().known(op, facts)
        zero = facts[0].zero
        if facts[0].total or not isinstance(found, tuple) or not bool(zero.any()):
            return found
        known, value = zero | found[0].known, found[0].value()
        value = torch.where(zero, torch.zeros((), dtype=value.dtype), value)
        return Fact.of_value(value, known.expand(torch.broadcast_shapes(known.shape, value.shape))), *found[1:]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> tuple[Labels, ...]:
        place, weight = self._place(op), op.arg("weight")
        if place is None or not c.mean_of_squares(labels[0], -1, ~c.facts_of(op)[0].zero, place):
            return super().couple(op, labels, c)
        out = [a if i == len(labels[0]) - 1 else c.uniform(a, [len(labels[0]) - 1]) for i, a in enumerate(labels[0])]
        own = moved(c.uniform(out[-1], range(len(out) - 1)), lambda a: a.reshape(-1))
        out[-1] = moved(c.equal(own, c.labels_of(weight)[0]), lambda a: lead(a, len(out)))
        return out, [*out[:-1], None]

    def _place(self, op: Op) -> ScalePlace | None:
        weight = op.arg("weight")
        if len(self._axes(op)) != 1 or not isinstance(weight, torch.fx.Node):
            return None
        statistics = any(u.target is not operator.getitem or u.args[1] != 0 for u in op.node.users)
        if weight.op != "get_attr" or len(weight.users) != 1 or statistics:
            return None
        return ScalePlace(((op.node, 3),), weight, 0.0, 0.5)


@register(aten._softmax.default, aten._safe_softmax.default, aten._log_softmax.default)
class Softmax(Rule):
    """Rows along one axis: each sums to one, so a row's axis cannot shrink."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        if facts[0].plain:
            found = evaluate(op, facts)
            assert isinstance(found, Fact)
            return found
        axis = op.arg("dim") % len(op.shape)
        safe = op.target is aten._safe_softmax.default
        sums = op.target is not aten._log_softmax.default and (not safe or _rows_are_open(op))
        known = squash(all_over(facts[0].known, [axis]))
        # each has a share that depends on the length
        if bool(known.any()) and facts[0].value().shape[axis] == op.shape[axis] and own_axes(op.inputs[0])[axis]:
            value = op.run(spread(facts[0].value(), [axis], op.shape).contiguous())
            return Fact.of_value(as_double(value), known).with_rows(axis if sums else None)
        return Fact.unknown(len(op.shape), axis if sums else None)

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        return [squash(any_over(needed[0], [op.arg("dim") % len(op.shape)]))]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        axis = op.arg("dim") % len(op.shape)
        out = list(labels[0])
        if c.matters(op):
            c.pin(out[axis], "is the axis of a softmax")
            out[axis] = None
        return [a if d == axis else c.uniform(a, [axis]) for d, a in enumerate(out)]


def _rows_are_open(op: Op) -> bool:
    """Whether no row can be masked whole: ``_safe_softmax`` then makes a zero row, which does not sum to one.

    True for bare scores, and for scores under a known mask that leaves every row an element.
    """
    node = op.inputs[0]
    while node.op == "call_function":
        if node.target in (aten.add.Tensor, aten.masked_fill.Scalar, aten.where.self):
            masks = [n for n in node.all_input_nodes if n.target is not aten.bmm.default]
            return node.target is aten.add.Tensor and any(_open_mask(n) for n in masks)
        if node.target in (aten.bmm.default, aten.mm.default, aten.baddbmm.default):
            return True
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


def _open_mask(node: torch.fx.Node) -> bool:
    """A mask computed from no input, every row of which has a finite element.

    What several ops read is kept in ``meta["mask"]``, or that it depends on an input: all layers read one mask.
    """

    def value(n: torch.fx.Node) -> Tensor | None:
        if len(n.users) < 2:
            return computed(n)
        if "mask" not in n.meta:
            n.meta["mask"] = computed(n)
        found: Tensor | None = n.meta["mask"]
        return found

    def computed(n: torch.fx.Node) -> Tensor | None:
        if n.op == "get_attr":
            state = n.meta.get("state")
            return None if state is None or state.is_meta or isinstance(state, FakeTensor) else state.detach().cpu()
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
            return None
        inputs: list[Tensor] = []
        op = Op(n)
        for source in op.inputs:
            found = value(source)
            if found is None:
                return None
            inputs.append(found)
        result = op.run(*inputs)
        return result if isinstance(result, Tensor) else None

    if any(i.op == "placeholder" and len(i.meta["tensor"].shape) > 3 for i in node.all_input_nodes):
        return False
    mask = value(node)
    return mask is not None and bool(torch.isfinite(mask).any(-1).all())
