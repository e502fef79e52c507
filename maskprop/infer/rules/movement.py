"""Movement ops: each result element is one input element.

Every such op is a short list of steps (permute, reshape, expand, slice, roll; see :mod:`maskprop.infer.rules.steps`),
which this file declares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx

from maskprop.infer.coupling import Coupling, Labels
from maskprop.infer.facts import Fact, everywhere
from maskprop.infer.op import Op
from maskprop.infer.places import VIEWS
from maskprop.infer.rules.registry import Rule, register_rule
from maskprop.infer.rules.reshaping import Shape
from maskprop.infer.rules.steps import (
    Expand,
    Part,
    Permute,
    Pick,
    Reshape,
    Roll,
    Slice,
    Step,
    move_back,
    move_fact,
)

aten = torch.ops.aten


class Movement(Rule):
    """An op declared as steps. ``steps`` returns one list for a single result, or a list a result."""

    def __init__(self, steps: Callable[[Op], Iterable[Step]]) -> None:
        self.steps = steps

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact:
        return move_fact(facts[0], list(self.steps(op)))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        return [move_back(needed[0], list(self.steps(op)))]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        out = labels[0]
        for step in self.steps(op):
            out = step.couple(out, c)
        return out


class Parts(Rule):
    """An op that cuts its input into several results."""

    def __init__(self, steps: Callable[[Op], list[list[Step]]]) -> None:
        self.steps = steps

    def known(self, op: Op, facts: Sequence[Fact]) -> tuple[Fact, ...]:
        return tuple(move_fact(facts[0], steps) for steps in self.steps(op))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        total = everywhere(False, len(op.shapes[0]))
        for part, steps in zip(needed, self.steps(op), strict=True):
            if bool(part.any()):
                total = total | move_back(part, steps)
        return [total]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> tuple[Labels, ...]:
        results = []
        for steps in self.steps(op):
            out = labels[0]
            for step in steps:
                out = step.couple(out, c)
            results.append(out)
        return tuple(results)


def _merges_next(node: fx.Node) -> bool:
    """Whether the value is reshaped next (through a copy)."""
    for user in node.users:
        if user.target in VIEWS:
            return True
        if user.target in (aten.clone.default, aten._to_copy.default) and _merges_next(user):
            return True
    return False


def _dims(op: Op, name: str = "dim") -> list[int]:
    value = op.arg(name)
    ndim = max(1, len(op.shapes[0]))
    return [d % ndim for d in (value if isinstance(value, (list, tuple)) else [value])]


def _swap(op: Op, a: int, b: int) -> list[Step]:
    order = list(range(len(op.shapes[0])))
    if order:
        order[a], order[b] = order[b], order[a]
    return [Permute(op.shapes[0], tuple(order))]


def _reshape(op: Op) -> list[Step]:
    return [Reshape(op.shapes[0], op.shape)]


def _slice(op: Op) -> list[Step]:
    shape, (dim,) = op.shapes[0], _dims(op)
    start, stop, step = slice(op.arg("start"), op.arg("end"), op.arg("step", 1)).indices(shape[dim])
    return [Slice(shape, dim, start, max(start, stop), step)]


def _without(shape: Shape, dim: int) -> Shape:
    return (*shape[:dim], *shape[dim + 1 :])


def _select(op: Op) -> list[Step]:
    shape, (dim,) = op.shapes[0], _dims(op)
    taken = Pick(shape, dim, (op.arg("index"),))
    return [taken, Reshape(taken.dst, _without(shape, dim))]


def _unbind(op: Op) -> list[list[Step]]:
    shape, (dim,) = op.shapes[0], _dims(op)
    taken = [Slice(shape, dim, i, i + 1, pins="is unbound along this axis") for i in range(shape[dim])]
    return [[one, Reshape(one.dst, _without(shape, dim))] for one in taken]


def _split_parts(op: Op) -> list[list[Step]]:
    (dim,) = _dims(op)
    sizes = [m.shape[dim] for m in op.results if m is not None]
    if len(set(sizes)) == 1:  # equal parts, however many
        return [
            [Part(op.shapes[0], dim, i * sizes[0], (i + 1) * sizes[0], parts=len(sizes))] for i in range(len(sizes))
        ]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [[Part(op.shapes[0], dim, s, s + n, parts=0)] for s, n in zip(starts, sizes, strict=True)]


def _roll(op: Op) -> list[Step]:
    shifts, dims = op.arg("shifts"), tuple(_dims(op, "dims"))
    shifts = shifts if isinstance(shifts, (list, tuple)) else [shifts]
    return [Roll(op.shapes[0], dims, lambda t: t.roll(shifts, dims), lambda t: t.roll([-s for s in shifts], dims))]


def _flip(op: Op) -> list[Step]:
    dims = tuple(_dims(op, "dims"))
    return [Roll(op.shapes[0], dims, lambda t: t.flip(dims), lambda t: t.flip(dims), mirrors=True)]


def _expand(op: Op) -> list[Step]:
    return [Expand(op.shapes[0], op.shape, _merges_next(op.node))]


_STEPS: dict[Callable[[Op], Iterable[Step]], list[torch._ops.OpOverload]] = {
    lambda op: [Permute(op.shapes[0], tuple(_dims(op, "dims")))]: [aten.permute.default],
    lambda op: _swap(op, *(_dims(op, "dim0") + _dims(op, "dim1"))): [aten.transpose.int],
    lambda op: _swap(op, 0, -1) if len(op.shape) == 2 else []: [aten.t.default],
    _reshape: [aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten._reshape_alias.default],
    _expand: [aten.expand.default],
    _slice: [aten.slice.Tensor],
    _select: [aten.select.int],
    _roll: [aten.roll.default],
    _flip: [aten.flip.default],
    lambda op: []: [aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh.default,
        aten.lift_fresh_copy.default, aten.contiguous.default, aten.dropout.default],
}  # fmt: skip
for _steps, _targets in _STEPS.items():
    for _target in _targets:
        register_rule(_target, Movement(_steps))
register_rule(aten.unbind.int, Parts(_unbind))
for _target in (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.unsafe_chunk.default,
    aten.chunk.default,
):
    register_rule(_target, Parts(_split_parts))
