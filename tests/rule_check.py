"""Hold one rule against what its op does, on random shapes, masks and values.

The oracle is the op itself, run on sampled inputs that agree with the facts. It knows nothing of any rule:

* ``known``: run on many inputs, an element claimed known must come out as claimed every time;
* ``needed``: replace *all* elements that are claimed not needed by other numbers, and no needed result may change;
* ``couple``: let units leave as the relations allow, run the op on what is left of its inputs, and it must give
  what is left of its result.

Where a case says that its rule is exact, the claims must also be the most that can be claimed.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

from maskprop.align.align import _keeps
from maskprop.align.constants import fold_constants
from maskprop.align.plan import Plan
from maskprop.align.solve import Solution, carriers, never_empty, regularity
from maskprop.graph.graph import TensorMeta
from maskprop.infer.coupling import Coupling, Labels, Pin, owned_axes
from maskprop.infer.facts import Fact
from maskprop.infer.op import Op
from maskprop.infer.rules import Rule

POINTS = 4
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Arg:
    """Stands for a tensor among a case's arguments.

    Attributes:
        shape: its shape.
        role: ``"value"`` (an activation), ``"weight"`` (a parameter, known and partly masked), ``"positive"``
            (a parameter that is nowhere zero or negative), ``"divisor"`` (an activation that is nowhere zero),
            ``"index"`` (integers below ``high``), ``"bool"``, ``"rows"`` (a softmax's result), ``"complex"``,
            ``"given"`` (``content``, always).
        name: of the parameter behind it.
    """

    shape: Shape
    role: str = "value"
    high: int = 0
    name: str = ""
    content: Tensor | None = None


@dataclass(frozen=True)
class Smaller:
    """What is left of a case's tensors: shapes of the inputs and results, and which units each input axis keeps."""

    ins: list[Shape]
    outs: list[Shape]
    kept: list[list[list[bool]]]


Call = tuple[OpOverload, tuple[Any, ...], dict[str, Any]]


@dataclass
class Case:
    """A call with :class:`Arg` in place of tensors.

    Attributes:
        shrink: the call on smaller inputs; by default the same call.
        exact: whether the rule claims all that is known here.
        tight: whether it claims no more to be needed than what has a gradient.
    """

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    shrink: Callable[[Smaller], Call] | None = None
    exact: bool = False
    tight: bool = False

    @property
    def tensors(self) -> list[Arg]:
        return [a for a in tree_leaves((self.args, self.kwargs)) if isinstance(a, Arg)]


class Trial:
    """A case with facts, ready to be checked. ``r`` decides everything that is random."""

    def __init__(self, case: Case, r: random.Random) -> None:
        self.case, self.r = case, r
        self.generator = torch.Generator().manual_seed(r.getrandbits(32))
        self.facts = [self._fact(a) for a in case.tensors]
        self.inputs = self.sample()
        self.op = self._op()

    # -- the call -------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Tensor], call: Call | None = None) -> list[Tensor]:
        """Results of the op on these inputs."""
        target, args, kwargs = call or (self.case.target, self.case.args, self.case.kwargs)
        values = iter(inputs)
        args, kwargs = tree_map_only(Arg, lambda _: next(values), (args, kwargs))
        result = target(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else [result]
        # an op may hand back views of its inputs
        return [r.clone() for r in results if isinstance(r, Tensor)]

    def _op(self) -> Op:
        graph = fx.Graph()
        count = itertools.count()

        def node(arg: Arg) -> fx.Node:
            made = graph.get_attr(arg.name) if arg.name else graph.placeholder(f"x{next(count)}")
            made.meta["tensor"] = TensorMeta(arg.shape, _dtype(arg), torch.device("cpu"))
            return made

        args, kwargs = tree_map_only(Arg, node, (self.case.args, self.case.kwargs))
        call = graph.call_function(self.case.target, tuple(args), kwargs)
        result = self.case.target(*self._filled()[0], **self._filled()[1])
        metas = [TensorMeta.of(t) if isinstance(t, Tensor) else None for t in _listed(result)]
        call.meta.update(
            tensor=tuple(metas) if isinstance(result, (tuple, list)) else metas[0], path="", module=nn.Linear
        )
        if self.case.target.name() == "aten::convolution":
            call.meta["module"] = nn.Conv2d
        graph.output(call)
        return Op(call)

    def _filled(self) -> Any:
        values = iter(self.inputs)
        return tree_map_only(Arg, lambda _: next(values), (self.case.args, self.case.kwargs))

    # -- random facts ---------------------------------------------------------------------------

    def _rand(self, shape: Shape) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _coin(self, shape: Shape, p: float = 0.5) -> Tensor:
        return torch.rand(shape, generator=self.generator) < p

    def pattern(self, shape: Shape) -> Shape:
        """A shape that broadcasts to ``shape`` and varies along some of its axes, most often along channels alone."""
        if shape and self.r.random() < 0.5:
            axis = self.r.choice([min(1, len(shape) - 1), self.r.randrange(len(shape))])
            return tuple(n if i == axis else 1 for i, n in enumerate(shape))
        return tuple(n if self.r.random() < 0.5 else 1 for n in shape)

    def _fact(self, arg: Arg) -> Fact:
        shape, ndim = arg.shape, len(arg.shape)
        kinds = {
            "value": ["unknown", "partial", "partial", "masked", "plain"],
            "divisor": ["unknown", "plain"],
        }
        kinds |= {"weight": ["masked", "masked", "plain"], "index": ["unknown", "plain"], "rows": ["unknown"]}
        kinds |= {"bool": ["unknown", "plain", "partial"]}
        kind = self.r.choice(kinds.get(arg.role, ["plain"]))
        if kind == "unknown":
            return Fact.unknown(ndim, ndim - 1 if arg.role == "rows" else None)
        value = self._random(arg)
        if kind == "plain":
            return Fact.constant(ndim, lambda: value)
        if kind == "masked":
            keep = self._coin(self.pattern(shape))
            return Fact(torch.ones((1,) * ndim, dtype=torch.bool), ~keep, lambda: value * keep)
        varies = self.pattern(shape)
        known = self._coin(varies)
        value = self._random(Arg(self._extended(varies, shape), arg.role))
        if value.is_floating_point():
            value = torch.where(self._coin(varies), value, 0.0)  # zeros, too
            value = torch.where(known, value, math.nan)  # whoever reads this is found out
        return Fact.of_value(value, known)

    def _extended(self, varies: Shape, shape: Shape) -> Shape:
        """A value may vary along more axes than what is known of it."""
        share = self.r.choice([0.0, 0.0, 0.5])
        return tuple(n if v > 1 or self.r.random() < share else 1 for v, n in zip(varies, shape, strict=True))

    def _random(self, arg: Arg) -> Tensor:
        if arg.role == "index":
            return torch.randint(0, arg.high, arg.shape, generator=self.generator)
        if arg.role == "bool":
            return self._coin(arg.shape)
        if arg.content is not None:
            return arg.content
        if arg.role == "complex":
            return torch.complex(self._rand(arg.shape), self._rand(arg.shape))
        value = self._rand(arg.shape)
        if arg.role in ("positive", "divisor"):
            return value.abs() + 0.1
        return value.softmax(-1) if arg.role == "rows" else value

    def sample(self) -> list[Tensor]:
        """Inputs that agree with the facts."""
        found = []
        for arg, fact in zip(self.case.tensors, self.facts, strict=True):
            free = self._random(arg)
            found.append(free if fact.nothing else torch.where(fact.known, fact.value().to(free.dtype), free))
        return found

    def perturb(self, inputs: Sequence[Tensor], needed: Sequence[Tensor]) -> list[Tensor]:
        """The inputs with other numbers wherever they are not needed."""
        found = []
        for x, n, arg in zip(inputs, needed, self.case.tensors, strict=True):
            other = x if arg.content is not None else self._random(Arg(tuple(x.shape), arg.role, arg.high))
            found.append(torch.where(n.expand(arg.shape) if n.shape != x.shape else n, x, other))
        return found


def _dtype(arg: Arg) -> torch.dtype:
    if arg.content is not None:
        return arg.content.dtype
    return {"index": torch.int64, "bool": torch.bool, "complex": torch.complex128}.get(arg.role, torch.float64)


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _close(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise equality up to rounding."""
    if not a.is_floating_point() and not a.is_complex():
        return a == b
    return torch.isclose(a, b, rtol=1e-8, atol=1e-10, equal_nan=True)


# -- the three questions ------------------------------------------------------------------------


def check_known(rule: Rule, trial: Trial) -> list[Fact]:
    """What the rule claims to be known is so, on several inputs."""
    claims = rule.known(trial.op, trial.facts)
    listed = list(claims) if isinstance(claims, tuple) else [claims]
    runs = [trial.run(trial.sample()) for _ in range(POINTS)]
    for claim, *results in zip(listed, *runs, strict=True):
        shape = results[0].shape
        assert claim.known.ndim == claim.zero.ndim == len(shape), "a fact has all axes of its value"
        known, zero = claim.known.expand(shape), claim.zero.expand(shape)
        assert not (zero & ~known).any(), "what is zero is known"
        if known.any():
            value = claim.value().expand(shape)
            for result in results:
                assert _close(value.to(result.dtype), result)[known].all(), "claimed known, and varies"
                assert _close(result, torch.zeros_like(result))[zero].all(), "claimed zero, and is not"
        if trial.case.exact:
            same = torch.stack([_close(r, results[0]) for r in results]).all(0)
            assert torch.equal(known, same), "not all that is known is claimed"
            exactly = torch.stack([r == 0 for r in results]).all(0)
            assert claim.plain or torch.equal(zero, exactly), "not all that is zero is claimed"
    return listed


def check_needed(rule: Rule, trial: Trial, needed: Sequence[Tensor] | None = None) -> None:
    """Other numbers where the rule says that nothing is needed leave the needed results as they are."""
    needed = some_needed(trial) if needed is None else needed
    claims = rule.needed(trial.op, trial.facts, needed)
    assert len(claims) == len(trial.inputs)
    for claim, x in zip(claims, trial.inputs, strict=True):
        assert claim.dtype == torch.bool
        assert claim.ndim == x.ndim, "neededness has all axes of its value"
        claim.expand(x.shape)
    before = trial.run(trial.inputs)
    for _ in range(2):
        after = trial.run(trial.perturb(trial.inputs, claims))
        for a, b, n in zip(before, after, needed, strict=True):
            assert _close(a, b)[n.expand(a.shape)].all(), "claimed not needed, and a needed result changes"
    if trial.case.tight:
        for claim, found in zip(claims, _sampled_needed(trial, needed), strict=True):
            if found is not None:
                assert torch.equal(claim.expand(found.shape), found), "claimed needed, and nothing changes"


def some_needed(trial: Trial) -> list[Tensor]:
    """A random choice of needed results."""
    metas = [m for m in trial.op.results if m is not None]
    return [trial._coin(trial.pattern(m.shape)) for m in metas]


def _sampled_needed(trial: Trial, needed: Sequence[Tensor]) -> list[Tensor | None]:
    """Elements that a needed result moves with, by gradients; ``None`` for integers."""
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in trial.inputs]
    total: Any = 0.0
    for result, n in zip(trial.run(inputs), needed, strict=True):
        if result.requires_grad:
            total = total + (result * trial._rand(tuple(result.shape)) * n).sum()
    leaves = [x for x in inputs if x.requires_grad]
    if not isinstance(total, Tensor):
        return [torch.zeros(x.shape, dtype=torch.bool) if x.requires_grad else None for x in inputs]
    grads = iter(torch.autograd.grad(total, leaves, allow_unused=True))
    found: list[Tensor | None] = []
    for x in inputs:
        g = next(grads) if x.requires_grad else None
        found.append(None if not x.requires_grad else torch.zeros(x.shape, dtype=torch.bool) if g is None else g != 0)
    return found


def check_couple(rule: Rule, trial: Trial) -> int:
    """Units leave as the relations allow, and the op on what is left gives what is left. Returns how many left."""
    op, case = trial.op, trial.case
    first, *others = some_needed(trial)
    needed = [first, *(n & False for n in others)]  # rules see the neededness of the first result
    facts = dict(zip(op.inputs, trial.facts, strict=True))
    c = Coupling(facts=facts, needed={op.node: needed if op.several else first}, node=op.node.name)
    for node, arg in zip(op.inputs, case.tensors, strict=True):
        c.labels[node] = _random_labels(trial, node, arg, c)
    out = rule.couple(op, [c.labels_of(n) for n in op.inputs], c)
    results: list[Labels] = list(out) if isinstance(out, tuple) else [out]
    c.labels[op.node] = out
    labels = [c.labels_of(n) for n in op.inputs]
    owned = [a for ls in labels for a in ls if a is not None]
    c.pins.append(Pin(_some_labels(trial, c.size), "stays by chance", ""))
    c.read += owned  # by what comes after
    s = Solution(c, owned)
    checks = carriers(c), regularity(c.regulars), never_empty([*owned_axes(labels), *c.nonempty])
    s.solve({str(i): check for i, check in enumerate(checks)})
    plan = _plan(op, labels, c, s)

    garbled = trial.perturb(trial.inputs, rule.needed(op, trial.facts, needed))
    compact = []
    for node, x, other, ls in zip(op.inputs, trial.inputs, garbled, labels, strict=True):
        if node.op == "get_attr":
            compact.append(_with_constants(plan, str(node.target), _left(x, ls, s)))
        else:
            compact.append(_left(other, ls, s))
    full = trial.run(trial.inputs)
    wanted = [_left(y, ls, s) for y, ls in zip(full, results, strict=True)]
    cares = [_left(n.expand(y.shape), ls, s) for n, y, ls in zip(needed, full, results, strict=True)]
    if all(a.numel() > 0 or b.numel() == 0 for a, b in zip([*compact, *wanted], [*trial.inputs, *full], strict=True)):
        kept = [
            [_kept(n, ls, axis, s) for axis, n in enumerate(x.shape)]
            for x, ls in zip(trial.inputs, labels, strict=True)
        ]
        smaller = Smaller([tuple(x.shape) for x in compact], [tuple(w.shape) for w in wanted], kept)
        got = trial.run(compact, case.shrink(smaller) if case.shrink else None)
        for g, w, care in zip(_with_new_bias(op, plan, got), wanted, cares, strict=True):
            assert g.shape == w.shape, f"the smaller op gives {tuple(g.shape)}, the labels {tuple(w.shape)}"
            assert _close(g, w)[care].all(), "the smaller op gives other numbers"
    return int(s.removed.sum())


def _plan(op: Op, labels: list[Labels], c: Coupling, s: Solution) -> Plan:
    """Kept indices of the op's parameters, and the constants that removed units leave in them."""
    plan = Plan()
    for node, ls in zip(op.inputs, labels, strict=True):
        if node.op == "get_attr" and (keeps := _keeps(ls, s)):
            plan.keep[str(node.target)] = keeps
            plan.shapes[str(node.target)] = tuple(node.meta["tensor"].shape)
    fold_constants(plan, c, s)
    return plan


def _with_constants(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    for add in plan.add:
        if add.name == name:
            tensor = tensor.clone()
            (tensor if add.axis is None else tensor.select(add.axis, add.at)).add_(add.value)
    return tensor


def _with_new_bias(op: Op, plan: Plan, results: list[Tensor]) -> list[Tensor]:
    if "bias" not in plan.new_bias:
        return results
    axis = 1 if op.target is torch.ops.aten.convolution.default else -1
    (y,) = results
    return [(y.movedim(axis, -1) + plan.new_bias["bias"]).movedim(-1, axis)]


def _random_labels(trial: Trial, node: fx.Node, arg: Arg, c: Coupling) -> Labels:
    """Fresh labels; an activation's batch axis may never shrink, and another axis may be ragged."""
    labels = c.labels_of(node)
    if arg.name:
        return labels
    r, ndim = trial.r, len(arg.shape)
    if ndim > 1 and r.random() < 0.5:
        labels[0] = None
    pairs = [(a, b) for a in range(ndim) for b in range(a + 1, ndim) if labels[a] is not None and labels[b] is not None]
    if pairs and r.random() < 0.3:
        a, b = r.choice(pairs)
        labels[b] = c.fresh([n if i in (a, b) else 1 for i, n in enumerate(arg.shape)])
        c.regular(labels, b)
    return labels


def _some_labels(trial: Trial, count: int) -> Tensor:
    share = trial.r.choice([0.0, 0.2, 0.6])
    return torch.nonzero(torch.rand(count, generator=trial.generator) < share).reshape(-1)


def _kept(size: int, labels: Labels, axis: int, s: Solution) -> list[bool]:
    """Which units of an axis stay; of a ragged one, at the first place that stays."""
    own = labels[axis]
    if own is None:
        return [True] * size
    keep = ~torch.from_numpy(s.leaves(own))
    over = [d for d in range(own.ndim) if d != axis and own.shape[d] > 1]
    for d in over:
        other = labels[d]
        if other is not None:
            rest = [i for i in range(other.ndim) if i not in over]
            keep = keep & (~torch.from_numpy(s.leaves(other))).any(rest, keepdim=True)
    found: list[bool] = max(keep.movedim(axis, -1).reshape(-1, size).tolist(), key=any)
    return found


def _left(x: Tensor, labels: Labels, s: Solution) -> Tensor:
    """What the solution leaves of a tensor: along each axis, as many units wherever the other axes stay."""
    kept = [None if a is None else ~torch.from_numpy(s.leaves(a)) for a in labels]
    counts = []
    for axis, own in enumerate(kept):
        if own is None:
            counts.append(x.shape[axis])
            continue
        here = own.sum(axis, keepdim=True)
        for d, other in enumerate(kept):
            if other is not None and d != axis and own.shape[d] > 1:
                here = torch.where(other, here, -1)
        some = here[here >= 0].unique()
        assert len(some) <= 1, f"other counts of units along axis {axis} at other places"
        counts.append(int(some[0]) if len(some) else 0)
    over = [0 if own is None else sum(n > 1 for n in own.shape) - (own.shape[d] > 1) for d, own in enumerate(kept)]
    for axis in sorted(range(x.ndim), key=lambda d: -over[d]):  # what varies along others before those
        own = kept[axis]
        if own is not None:
            order = (~own).to(torch.uint8).argsort(dim=axis, stable=True).narrow(axis, 0, counts[axis])
            x = x.gather(axis, order.expand(*x.shape[:axis], counts[axis], *x.shape[axis + 1 :]))
    return x
