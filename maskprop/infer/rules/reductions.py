"""Reductions over axes.

Algebra: what is uniform along the reduced axes reduces to a known number. A sum or a norm does not see a known
zero, so such units may leave; an extremum compares with them, so they stay. A mean divides by their number: they may
leave where the factor can be made up for (the mean of squares in an RMS norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskprop.graph.graph import TensorMeta
from maskprop.infer.coupling import Coupling, Labels, moved
from maskprop.infer.facts import Fact, all_over, any_over, as_double, everywhere, spread
from maskprop.infer.op import Op
from maskprop.infer.places import scale_place
from maskprop.infer.rules.extent import own_axes
from maskprop.infer.rules.registry import Rule, evaluate, register, unknowns
from maskprop.infer.rules.spatial import varies

aten = torch.ops.aten
# Which result says where an element was found.
_POSITIONS = {
    "aten::argmax": 0, "aten::argmin": 0, "aten::max": 1, "aten::min": 1, "aten::median": 1, "aten::sort": 1,
    "aten::topk": 1, "aten::cummax": 1, "aten::cummin": 1,
}  # fmt: skip


@register(
    aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default, aten.amax.default, aten.amin.default,
    aten.prod.dim_int, aten.var.correction, aten.var.dim, aten.var_mean.correction, aten.std.correction,
        aten.logsumexp.default,
    aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.any.dim, aten.all.dim, aten.any.default,
        aten.all.default,
    aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim, aten.count_nonzero.dim_IntList,
        aten.max.default, aten.min.default,
    aten.any.dims, aten.all.dims, aten.sort.default, aten.topk.default, aten.cumsum.default, aten.median.dim,
    aten.cumprod.default, aten.logcumsumexp.default, aten.cummax.default, aten.cummin.default,
)  # fmt: skip
class Reduction(Rule):
    """Any op that folds axes ``dim`` (all of them by default), and scans and sorts along one axis."""

    def _dims(self, op: Op) -> list[int]:
        ndim = len(op.shapes[0])
        dims = op.arg("dim", -1 if op.target in (aten.topk.default, aten.sort.default) else None)
        if dims is None or dims == []:
            return list(range(ndim))
        return [d % max(1, ndim) for d in (dims if isinstance(dims, (list, tuple)) else [dims])] if ndim else []

    def _keeps_axes(self, op: Op, result: TensorMeta) -> bool:
        return len(result.shape) == len(op.shapes[0])

    def _folds(self, op: Op, dim: int) -> bool:
        """Whether the results do not have the axis any more: a scan, say, has."""
        return all(m is None or not self._keeps_axes(op, m) or m.shape[dim] == 1 for m in op.results)

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        fact = facts[0]
        dims = self._dims(op)
        known = all_over(fact.known, dims)
        if fact.plain and bool(known.all()):
            return evaluate(op, facts)
        free = self._free(op, fact, dims)
        if free:
            # what varies by the distance to the borders, say, is another number for an input of another size
            known = known & ~varies(fact.value(), free)
        if fact.nothing or not bool(known.any()):
            found = unknowns(op)
            return found if op.several else found[0]
        results = op.run(spread(fact.value(), dims, op.shapes[0]).contiguous())
        others = self._longer(op, fact, dims, free, results)
        folded = known.reshape([n for d, n in enumerate(known.shape) if d not in dims])
        made = []
        for i, (r, other, meta) in enumerate(zip(_several(results), others, op.results, strict=True)):
            assert meta is not None
            if _POSITIONS.get(op.target._schema.name) == i:  # which of several equal numbers is not defined
                made.append(Fact.unknown(len(meta.shape)))
                continue
            k = (known if self._keeps_axes(op, meta) else folded) & _same(r, other)
            made.append(Fact.of_value(as_double(r), k))
        return tuple(made) if op.several else made[0]

    @staticmethod
    def _free(op: Op, fact: Fact, dims: Sequence[int]) -> list[int]:
        """Those of the axes along which a value varies that inputs may make longer."""
        if fact.nothing or all(fact.value().shape[d] == 1 for d in dims):
            return []
        own = own_axes(op.inputs[0])
        return [d for d in dims if not own[d] and fact.value().shape[d] > 1]

    def _longer(self, op: Op, fact: Fact, dims: Sequence[int], free: Sequence[int], results: Any) -> list[Tensor]:
        """The results where the axes along which nothing varies, as along space and time, are longer by one.

        What is not the same then is known for inputs of one size only, and that is not known.
        """
        value = fact.value()
        for d in free:  # nor does what is known still vary along these
            value = torch.cat([value, value.narrow(d, -1, 1)], d)
        longer = [n + (d in free or (d in dims and value.shape[d] == 1 < n)) for d, n in enumerate(op.shapes[0])]
        if tuple(longer) == op.shapes[0]:
            return _several(results)
        made = _several(op.run(spread(value, dims, longer).contiguous()))
        for i, r in enumerate(_several(results)):
            for d, n in enumerate(r.shape):
                made[i] = made[i].narrow(d, made[i].shape[d] - n, n)  # of a scan, the end
        return made

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        dims, ndim = self._dims(op), len(op.shapes[0])
        total = everywhere(False, ndim)
        for n in needed:
            if n.ndim != ndim:
                for d in sorted(dims):
                    n = n.unsqueeze(d)
            total = total | any_over(n, dims)
        return [total]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels | tuple[Labels, ...]:
        dims = self._dims(op)
        for d in dims:
            if _ignores_zeros(op):
                self._terminate(op, labels[0][d], c)
            elif not c.matters(op) and self._folds(op, d):
                continue  # nobody sees what it makes of the axis
            elif op.target is aten.mean.dim and len(dims) == 1 and labels[0][d] is not None:
                c.mean_of_squares(labels[0], d, ~c.facts_of(op)[0].zero, scale_place(op.node))
            else:
                c.pin(labels[0][d], "is reduced over here")
        passing = [None if i in dims else c.uniform(a, dims) for i, a in enumerate(labels[0])]
        folded = [moved(a, lambda t: t.squeeze(dims)) for i, a in enumerate(passing) if i not in dims]
        found = [
            list(passing) if meta is not None and self._keeps_axes(op, meta) else list(folded) for meta in op.results
        ]
        return tuple(found) if op.several else found[0]

    def _terminate(self, op: Op, labels: Tensor | None, c: Coupling) -> None:
        """Known zeros may leave, and what no needed result reads."""
        if labels is None:
            return
        (fact,) = c.facts_of(op)
        live = ~fact.zero & self.needed(op, [fact], [c.needed_of(op)])[0]
        c.end(labels, live, "is summed here")


def _same(a: Tensor, b: Tensor) -> Tensor:
    return torch.isclose(a, b, rtol=1e-12, atol=0.0, equal_nan=True) if a.is_floating_point() else a == b


def _several(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _ignores_zeros(op: Op) -> bool:
    """Whether elements that are zero do not change the result: sums, and norms of positive order."""
    name = op.target._schema.name
    if name in ("aten::linalg_vector_norm", "aten::norm"):
        order = op.arg("ord", op.arg("p"))
        return order is None or bool(order > 0)
    return name in ("aten::sum", "aten::count_nonzero")
