"""Ops that look values up by index: embedding, index, index_select, gather.

Algebra: an axis that is looked up by index keeps all its units, and what is known of its result is known of all of
them. The other axes pass through, as do the axes of the index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from maskprop.infer.coupling import Coupling, Labels, moved
from maskprop.infer.facts import Fact, all_over, any_over, as_double, spread
from maskprop.infer.op import Op
from maskprop.infer.rules.registry import Rule, evaluate, register, unknowns
from maskprop.infer.rules.steps import Pick, Step, move_back, move_fact

aten = torch.ops.aten


@register(aten.embedding.default)
class Embedding(Rule):
    """Rows of a table by index: the table's rows stay, its columns are the result's last axis."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        table, index = facts
        if table.total and index.total:
            return evaluate(op, facts)
        zero = all_over(table.zero, [0])
        return Fact.zeros(zero.reshape((1,) * (len(op.shape) - 1) + (-1,)))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        n = needed[0]
        columns = any_over(n, range(n.ndim - 1)).reshape(1, -1)
        return [columns, torch.full((1,) * len(op.shapes[1]), bool(columns.any()))]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        table, index = labels
        c.pin(table[0], "is looked up by index")
        columns = moved(c.uniform(table[1], [0]), lambda a: a.reshape((1,) * (len(op.shape) - 1) + (-1,)))
        return [*(moved(a, lambda a: a.unsqueeze(-1)) for a in index), columns]


@register(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
class EmbeddingBag(Rule):
    """Sums, means or maxima of rows of a table: its columns are the result's, and a column of zeros stays zero."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        if all(f.total for f in facts):
            return evaluate(op, facts)
        return Fact.zeros(all_over(facts[0].zero, [0])), *unknowns(op)[1:]

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        if any(bool(n.any()) for n in needed[1:]):
            return super().needed(op, facts, needed)
        columns = any_over(needed[0], [0])
        return [columns, *(torch.full((1,) * len(shape), bool(columns.any())) for shape in op.shapes[1:])]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> tuple[Labels, ...]:
        table, *others = labels
        for array in others:
            c.pin_all(array, "says what an embedding bag sums")
        c.pin(table[0], "is looked up by index")
        columns = c.uniform(table[1], [0])
        width = op.shapes[0][1]
        return tuple(
            [columns if i == 1 and n == width else None for i, n in enumerate(m.shape)] if m is not None else []
            for m in op.results
        )


class _Lookup(Rule):
    """Shared by index ops: some axes of the source are looked up, the others pass in order."""

    def _plan(self, op: Op) -> tuple[list[int], int] | None:
        """Looked-up axes of the source and where the index's axes stand in the result; ``None`` if unclear."""
        raise NotImplementedError

    def _steps(self, op: Op) -> list[Step] | None:
        """What looking up constant places along one axis comes down to; ``None`` for other indices."""
        plan, (_, *indices) = self._plan(op), op.inputs
        places = constant_places(indices[0]) if len(indices) == 1 else None
        return None if plan is None or not places else [Pick(op.shapes[0], plan[0][0], places)]

    def _axes(self, op: Op) -> list[int | None] | None:
        """For each result axis, the source axis that it is, or ``None`` for an index axis."""
        plan = self._plan(op)
        if plan is None:
            return None
        looked, at = plan
        kept: list[int | None] = [i for i in range(len(op.shapes[0])) if i not in looked]
        return kept[:at] + [None] * (len(op.shape) - len(kept)) + kept[at:]

    def _pass(self, t: Tensor, axes: Sequence[int | None]) -> Tensor:
        """A tensor that does not vary along the looked-up axes, in the result's axes."""
        kept = [a for a in axes if a is not None]
        sizes = iter([t.shape[a] for a in kept])
        return t.reshape([1 if a is None else next(sizes) for a in axes])

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        axes, fact, steps = self._axes(op), facts[0], self._steps(op)
        if steps is not None:
            return move_fact(fact, steps)
        total = all(f.total for f in facts)
        if total and (axes is None or all(f.plain for f in facts)):
            return evaluate(op, facts)
        if axes is None or fact.nothing:
            return Fact.unknown(len(op.shape))
        looked = [i for i in range(len(op.shapes[0])) if i not in axes]
        if total:  # along the other axes the result varies no more than the source does
            indices = [f.value().expand(shape) for f, shape in zip(facts[1:], op.shapes[1:], strict=True)]
            return Fact.of_value(as_double(op.run(spread(fact.value(), looked, op.shapes[0]), *indices)))
        if not fact.plain and all(fact.known.shape[i] == fact.value().shape[i] == 1 for i in looked):
            return fact.map(lambda t: self._pass(all_over(t, looked) if t.dtype == torch.bool else t, axes))
        return Fact.zeros(self._pass(all_over(fact.zero, looked), axes))

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        axes, n, steps = self._axes(op), needed[0], self._steps(op)
        found = super().needed(op, facts, needed)
        if steps is not None:
            found[0] = move_back(n, steps)
        elif axes is not None:
            n = any_over(n, [i for i, a in enumerate(axes) if a is None])
            sizes = [1] * len(op.shapes[0])
            for i, a in enumerate(axes):
                if a is not None:
                    sizes[a] = n.shape[i]
            found[0] = n.reshape(sizes)
        return found

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        axes, source = self._axes(op), labels[0]
        for array in labels[1:]:
            c.pin_all(array, "is used as an index")
        for step in self._steps(op) or ():
            return step.couple(source, c)
        if axes is None:
            c.pin_all(source, "is indexed in a mixed order")
            return [None] * len(op.shape)
        looked = [i for i in range(len(source)) if i not in axes]
        for i in looked:
            c.pin(source[i], "is looked up by index")
        passing = [None if a is None else c.uniform(source[a], looked) for a in axes]
        return [moved(a, lambda t: self._pass(t, axes)) for a in passing]


def constant_places(index: fx.Node) -> tuple[int, ...] | None:
    """The numbers of an index that ``forward`` holds as a list; ``None`` for any other."""
    while index.target is aten.lift_fresh.default:
        index = index.all_input_nodes[0]
    state = index.meta.get("state") if "lifted" in index.meta else None
    if state is None or state.is_meta or state.ndim != 1 or state.dtype != torch.int64:
        return None
    return tuple(state.tolist())


def looked_up(indices: Sequence[fx.Node | None]) -> tuple[list[int], int] | None:
    """Of ``x[indices]``: the axes of ``x`` that are looked up, and where the index's axes stand in the result.

    A bool index of n axes looks up n axes, and stands for one. ``None`` where one is mixed with other indices.
    """
    looked: list[int] = []
    at = 0
    for index in indices:
        meta = None if index is None else index.meta["tensor"]
        taken = len(meta.shape) if meta is not None and meta.dtype in (torch.bool, torch.uint8) else 1
        if meta is not None:
            looked += range(at, at + taken)
        at += taken
    if len(looked) > 1 and sum(i is not None for i in indices) > 1 and at != len(indices):
        return None
    contiguous = looked == list(range(looked[0], looked[-1] + 1))
    return looked, looked[0] if contiguous else 0


@register(aten.index.Tensor, aten._unsafe_index.Tensor)
class Index(_Lookup):
    """``x[i, :, j]`` with index tensors."""

    def _plan(self, op: Op) -> tuple[list[int], int] | None:
        return looked_up(op.arg("indices"))


@register(aten.index_select.default)
class IndexSelect(_Lookup):
    """``x`` at ``index`` along one axis."""

    def _plan(self, op: Op) -> tuple[list[int], int] | None:
        dim = op.arg("dim") % len(op.shapes[0])
        return [dim], dim


@register(aten.gather.default)
class Gather(Rule):
    """``x`` at ``index`` along one axis, elementwise along the others."""

    def _axes(self, op: Op) -> tuple[int, list[int]]:
        """The axis that is looked up, and those of which the index covers a part."""
        source, index = op.shapes
        dim = int(op.arg("dim")) % max(1, len(source))
        return dim, [i for i in range(len(source)) if i != dim and source[i] != index[i]]

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        if all(f.total for f in facts):
            return evaluate(op, facts)
        dim, partly = self._axes(op)
        source = facts[0]
        if not source.nothing and all(source.known.shape[i] == source.value().shape[i] == 1 for i in (dim, *partly)):
            return source.map(lambda t: t)  # the same wherever it is looked up
        return Fact.zeros(all_over(source.zero, [dim, *partly]))

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels:
        (source, index), (dim, partly) = labels, self._axes(op)
        c.pin(source[dim], "is looked up by index")
        out: Labels = []
        for axis in range(len(op.shape)):
            if axis == dim:
                out.append(index[axis])
            elif axis in partly:
                out.append(c.equal(source[axis], None, "is looked up in part"))
                c.pin(index[axis], "looks up a part")
            else:
                out.append(c.equal(c.uniform(source[axis], [dim, *partly]), index[axis]))
        return out
