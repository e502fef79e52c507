"""Reductions over axes.

Algebra: what is uniform along the reduced axes reduces to a known number. A sum or a norm does not see a known
zero, so such units may leave; a mean divides by their number and an extremum compares with them, so they stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels
from maskprop.infer.facts import Fact, all_over, any_over, as_double, spread
from maskprop.infer.op import Op
from maskprop.infer.rules.registry import Rule, evaluate, register

aten = torch.ops.aten
_SEES_NO_ZERO = ("aten::sum", "aten::linalg_vector_norm", "aten::norm", "aten::count_nonzero")


@register(
    aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default, aten.amax.default, aten.amin.default,
    aten.prod.dim_int, aten.var.correction, aten.var.dim, aten.var_mean.correction, aten.std.correction, aten.logsumexp.default,
    aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.any.dim, aten.all.dim, aten.any.default, aten.all.default,
    aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim, aten.count_nonzero.dim_IntList, aten.max.default, aten.min.default,
    aten.any.dims, aten.all.dims, aten.sort.default, aten.topk.default, aten.cumsum.default, aten.median.dim,
)  # fmt: skip
class Reduction(Rule):
    """Any op that folds axes ``dim`` (all of them by default), and scans and sorts along one axis."""

    def _dims(self, op: Op) -> list[int]:
        ndim = len(op.shapes[0])
        dims = op.arg("dim", -1 if op.target in (aten.topk.default, aten.sort.default) else None)
        if dims is None or dims == []:
            return list(range(ndim))
        return (
            [d % max(1, ndim) for d in (dims if isinstance(dims, (list, tuple)) else [dims])] if ndim else []
        )

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        fact = facts[0]
        if fact.total:
            return evaluate(op, facts)
        none = tuple(Fact.unknown(len(m.shape)) for m in op.results if m is not None)
        dims = self._dims(op)
        known = all_over(fact.known, dims)
        if fact.nothing or not bool(known.any()):
            return none if op.several else none[0]
        results = op.run(spread(fact.value(), dims, op.shapes[0]))
        results = results if op.several else (results,)
        kept = {d for d in range(known.ndim) if d not in dims}
        made = []
        for r, meta in zip(results, op.results, strict=True):
            assert meta is not None
            shape = (
                list(known.shape)
                if r.ndim == known.ndim
                else [n for d, n in enumerate(known.shape) if d in kept]
            )
            k = known.reshape(shape)
            made.append(
                Fact.of_value(
                    torch.where(k, as_double(r), torch.zeros((), dtype=as_double(r).dtype)),
                    k.expand(torch.broadcast_shapes(k.shape, r.shape)),
                )
            )
        return tuple(made) if op.several else made[0]

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        dims, ndim = self._dims(op), len(op.shapes[0])
        total = torch.zeros((1,) * ndim, dtype=torch.bool)
        for n in needed:
            if n.ndim != ndim:
                for d in sorted(dims):
                    n = n.unsqueeze(d)
            total = total | any_over(n, dims)
        return [total]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels | tuple[Labels, ...]:
        dims = self._dims(op)
        arrays = list(labels[0])
        for d in dims:
            array = arrays[d]
            if array is None:
                continue
            if op.target._schema.name in _SEES_NO_ZERO:
                c.read.append(array)
                fact = c.facts_of(op)[0]
                live = ~fact.zero & self.needed(op, [fact], [c.needed_of(op)])[0]
                shape = torch.broadcast_shapes(live.shape, array.shape)
                c.pin(array.expand(shape)[live.expand(shape)], "is summed here", live=True)
            else:
                c.pin(array, "is reduced over here")
        arrays = [
            None if i in dims else c.uniform(a, [d for d in dims if d != i]) for i, a in enumerate(arrays)
        ]
        found = []
        for meta in op.results:
            n = 0 if meta is None else len(meta.shape)
            if n == len(arrays):
                found.append(list(arrays))
            else:
                kept = [i for i in range(len(arrays)) if i not in dims]
                found.append(
                    [None if arrays[i] is None else arrays[i].squeeze(dims) for i in kept] if n else []
                )  # type: ignore[union-attr]
        return tuple(found) if op.several else found[0]
