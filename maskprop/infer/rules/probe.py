"""The numeric probe: what an op without a rule does, found by running it on random inputs.

* **known**: an element of a result that never varies, though it does once the masked inputs are no longer masked;
* **needed**: an element of an input that never gets a gradient, though it does without masks, and that may be
  replaced, together with all others like it, without changing a needed result;
* **coupling**: an axis of the result *follows* axes of the inputs if dropping some indices there drops the same ones
  here and changes nothing else. Axes are *summed* if indices with zeros in an input can be dropped without a change.

Numbers are evidence, not proof. Whatever is not established stays: discrete ops keep everything needed, integers of
unknown range say little, and an axis that nothing follows is pinned. Every claim is listed in :class:`Claims`, and
the check of the finished model stands behind them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from maskprop.infer.coupling import Coupling, Labels, moved
from maskprop.infer.facts import Fact, all_over, as_double, squash
from maskprop.infer.op import Op
from maskprop.infer.rules.registry import Rule, unknowns
from maskprop.infer.sampling import Point, Runner, Sampler, aside, close, equal, is_float, same

log = logging.getLogger(__name__)
_T = TypeVar("_T")
_MOST_PARTNERS = 64  # combinations of axes that are tried together with one


@dataclass
class Claims:
    """What a probe found of one op.

    Attributes:
        op: the op.
        known: how many elements of its results it takes as known.
        unneeded: how many elements of its inputs it takes as not needed.
        moves: which axes follow or are summed, in words.
        failures: why it found nothing, by what was asked.
    """

    op: Op
    known: int = 0
    unneeded: int = 0
    moves: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        found = list(self.moves)
        found += [f"{self.known} elements known"] * (self.known > 0)
        found += [f"{self.unneeded} elements not needed"] * (self.unneeded > 0)
        return f"{self.op}: " + ("; ".join(found or sorted(set(self.failures.values()))) or "nothing found")


@dataclass(frozen=True)
class Move:
    """Axes of the inputs whose indices can only be dropped together.

    Attributes:
        axes: input position -> axis.
        results: for each result, the axis that follows, or ``None`` for a result that does not change.
        enders: for axes that are summed: the inputs whose zeros may be dropped.
    """

    axes: dict[int, int]
    results: tuple[int | None, ...]
    enders: tuple[int, ...] = ()

    def size(self, shapes: Sequence[Sequence[int]]) -> int:
        """Length of the axes."""
        i, axis = next(iter(self.axes.items()))
        return shapes[i][axis]

    def __str__(self) -> str:
        source = " with ".join(f"axis {a} of input {i}" for i, a in self.axes.items())
        if self.enders:
            return f"{source} is summed"
        return f"{source} becomes " + ", ".join(
            f"axis {b} of result {i}" for i, b in enumerate(self.results) if b is not None
        )


class Probe(Rule):
    """The rule of one call, sampled.

    Args:
        op: the call.
        confidence: number of random inputs.
        generator: where they come from.
    """

    def __init__(self, op: Op, confidence: int, generator: torch.Generator) -> None:
        self.claims = Claims(op)
        self._sampler = Sampler(confidence, generator)
        self._moves: list[Move] | None = None

    # -- the three questions --------------------------------------------------------------------

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        if all(f.plain for f in facts):
            return self._constants(op, facts)
        found = self._attempt("known", lambda: self._known(op, facts)) or unknowns(op)
        self.claims.known = sum(int(f.known.sum()) for f in found)
        return tuple(found) if op.several else found[0]

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        every = super().needed(op, facts, needed)
        masked = not all(f.nothing for f in facts) or not all(bool(n.all()) for n in needed)
        if all(f.total for f in facts) or not masked or not any(bool(n.any()) for n in needed):
            return every
        found = self._attempt("needed", lambda: self._needed(op, facts, needed))
        if found is None:
            return every
        self.claims.unneeded = sum(int((~n).sum()) for n in found)
        return [squash(n) for n in found]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels | tuple[Labels, ...]:
        if self._moves is None and any(a is not None for own in labels for a in own):
            self._moves = self._attempt("couple", lambda: self._search(op, c.facts_of(op))) or []
            self.claims.moves = [str(m) for m in self._moves]
        moves = self._moves or []
        placed = {place for m in moves for place in m.axes.items()}
        for i, own in enumerate(labels):
            loose = [a for axis, a in enumerate(own) if (i, axis) not in placed]
            c.pin_all(loose, f"goes into {op.target}, of which no axis is seen to follow it")
        found: list[Labels] = [[None] * (0 if m is None else len(m.shape)) for m in op.results]
        for move in moves:
            row = self._tied(move, labels, c)
            if row is None:
                continue
            if move.enders:
                self._end(op, move, row, c)
            for own, axis in zip(found, move.results, strict=True):
                if axis is not None:
                    own[axis] = row.reshape([-1 if d == axis else 1 for d in range(len(own))])
        return tuple(found) if op.several else found[0]

    def _tied(self, move: Move, labels: Sequence[Labels], c: Coupling) -> Tensor | None:
        """The labels of axes that are dropped together, as one vector."""
        rows = []
        for i, axis in move.axes.items():
            others = [d for d in range(len(labels[i])) if d != axis]
            rows.append(moved(c.uniform(labels[i][axis], others), lambda t: t.reshape(-1)))
        row = rows[0]
        for other in rows[1:]:
            row = c.equal(row, other)
        return row

    def _end(self, op: Op, move: Move, labels: Tensor, c: Coupling) -> None:
        """Summed units may leave where one of the inputs is known to be zero."""
        free = torch.zeros(len(labels), dtype=torch.bool)
        for i in move.enders:
            zero = c.facts_of(op)[i].zero
            free = free | all_over(zero, [d for d in range(zero.ndim) if d != move.axes[i]]).reshape(-1)
        c.end(labels, ~free, f"is read by {op.target}")

    # -- known ----------------------------------------------------------------------------------

    def _constants(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        """Of constants that no mask touches: computed when somebody asks."""

        @cache
        def results() -> Point:
            with aside():
                point = [f.value().expand(s) for f, s in zip(facts, op.shapes, strict=True)]
                return Runner(op, point)(point)

        ndims = [0 if m is None else len(m.shape) for m in op.results]
        found = tuple(Fact.constant(n, lambda i=i: as_double(results()[i])) for i, n in enumerate(ndims))  # type: ignore[misc]
        return found if op.several else found[0]

    def _known(self, op: Op, facts: Sequence[Fact]) -> list[Fact] | None:
        if all(f.nothing for f in facts) or _unknown_integers(op, facts):
            return None
        points, free = self._sampler.points(op, facts), self._sampler.points(op, _unmasked(op, facts))
        run = Runner(op, points[0])
        if all(f.total for f in facts):
            return [Fact.of_value(as_double(r)) for r in run(points[0])]
        found = []
        for first, others in zip(zip(*map(run, points), strict=True), zip(*map(run, free), strict=True), strict=True):
            never = same(first) & ~same(others)
            if not first[0].is_floating_point() or not bool(never.any()):
                found.append(Fact.unknown(never.ndim))
            else:
                found.append(Fact.of_value(squash(torch.where(never, as_double(first[0]), 0.0)), squash(never)))
        return found

    # -- needed ---------------------------------------------------------------------------------

    def _needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor] | None:
        if _unknown_integers(op, facts):
            return None
        points, free = self._sampler.points(op, facts), self._sampler.points(op, _unmasked(op, facts))
        run = Runner(op, points[0])
        reached = self._reached(op, run, points, needed)
        reachable = self._reached(op, run, free, [torch.ones_like(n) for n in needed])
        if reached is None or reachable is None:
            return None
        unneeded = [able & ~r for r, able in zip(reached, reachable, strict=True)]
        unknown = [~f.known.expand(s) for f, s in zip(facts, op.shapes, strict=True)]
        # where both factors of a product are zero, neither gets a gradient, and yet each relies on the other
        for claim in (unneeded, [u & k for u, k in zip(unneeded, unknown, strict=True)]):
            if self._irrelevant(run, points, free, claim, needed):
                return [~u for u in claim]
        return None

    def _reached(self, op: Op, run: Runner, points: list[Point], needed: Sequence[Tensor]) -> list[Tensor] | None:
        """Elements of the inputs that get a gradient from a needed result; ``None`` if the op gives none."""
        found = {n: torch.full(s, not is_float(n)) for n, s in zip(op.inputs, op.shapes, strict=True)}
        for point in points:
            values = dict(zip(op.inputs, point, strict=True))
            leaves = {n: x.clone().requires_grad_() for n, x in values.items() if is_float(n)}
            with torch.enable_grad():
                results = run([leaves.get(n, values[n]) for n in op.inputs])
                wanted = [(r, n) for r, n in zip(results, needed, strict=True) if bool(n.any())]
                if not leaves or not all(r.is_floating_point() and r.requires_grad for r, _ in wanted):
                    return None
                total = sum((r * self._sampler.normal(r.shape) * n).sum() for r, n in wanted)
                assert isinstance(total, Tensor)
                grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            for node, grad in zip(leaves, grads, strict=True):
                found[node] = found[node] | (torch.ones(()).bool() if grad is None else grad != 0)
        return [found[n] for n in op.inputs]

    def _irrelevant(
        self,
        run: Runner,
        points: list[Point],
        others: list[Point],
        unneeded: Sequence[Tensor],
        needed: Sequence[Tensor],
    ) -> bool:
        """Whether other numbers in all these places at once leave the needed results as they are."""
        for point, other in zip(points, others, strict=True):
            changed = [torch.where(u, o, x) for u, o, x in zip(unneeded, other, point, strict=True)]
            for a, b, n in zip(run(point), run(changed), needed, strict=True):
                if not bool(close(a, b)[n.expand(a.shape)].all()):
                    return False
        return True

    # -- coupling -------------------------------------------------------------------------------

    def _search(self, op: Op, facts: Sequence[Fact]) -> list[Move]:
        """All axes that follow or are summed, first alone, then together with others of the same length."""
        points = self._sampler.points(op, _unmasked(op, facts))
        run = Runner(op, points[0])
        full = [run(x) for x in points]
        if not all(bool(r.isfinite().any()) for results in full for r in results):
            points = self._sampler.points(op, facts)  # an op that takes positive numbers only, say
            full = [run(x) for x in points]
        moves: list[Move] = []
        placed: set[tuple[int, int]] = set()
        for start in [(i, a) for i, s in enumerate(op.shapes) for a, n in enumerate(s) if n > 1]:
            for axes in _partners(op, *start) if start not in placed else ():
                if placed.isdisjoint(axes.items()):
                    move = self._follow(op, run, points, full, axes) or self._summed(op, run, points, facts, axes)
                    if move is not None:
                        moves.append(move)
                        placed |= set(axes.items())
                        break
        return moves if self._hold_together(run, points, full, moves) else []

    def _follow(self, op: Op, run: Runner, points: list[Point], full: list[Point], axes: dict[int, int]) -> Move | None:
        """Whether an axis of the results follows these axes."""
        found: set[tuple[int | None, ...]] = set()
        size = Move(axes, ()).size(op.shapes)
        for point, results, keep in zip(points, full, self._sampler.subsets(size), strict=False):
            smaller = run.attempt(_dropped(point, axes, keep))
            if smaller is None:
                return None
            axis = tuple(_follower(a, b, keep) for a, b in zip(results, smaller, strict=True))
            found.add(axis)
            if -1 in axis or set(axis) == {None} or len(found) > 1:
                return None
        return Move(axes, found.pop())

    def _summed(
        self, op: Op, run: Runner, points: list[Point], facts: Sequence[Fact], axes: dict[int, int]
    ) -> Move | None:
        """Whether indices of these axes that are zero in one of the inputs can be dropped without a change."""
        if _unknown_integers(op, facts):
            return None
        enders = [i for i in axes if is_float(op.inputs[i])]
        for point, keep in zip(points, self._sampler.subsets(Move(axes, ()).size(op.shapes)), strict=False):
            enders = [i for i in enders if self._drops_zeros(run, point, axes, keep, i)]
        return Move(axes, (None,) * len(op.results), tuple(enders)) if enders else None

    def _drops_zeros(self, run: Runner, point: Point, axes: dict[int, int], keep: Tensor, ender: int) -> bool:
        shape = [-1 if d == axes[ender] else 1 for d in range(point[ender].ndim)]
        zeroed = [x * keep.reshape(shape) if i == ender else x for i, x in enumerate(point)]
        without = run.attempt(_dropped(zeroed, axes, keep))
        return without is not None and equal(run(zeroed), without)

    def _hold_together(self, run: Runner, points: list[Point], full: list[Point], moves: list[Move]) -> bool:
        """Whether all axes that follow can be dropped at once."""
        for point, results in zip(points, full, strict=True):
            for move in moves:
                if not move.enders:
                    keep = next(self._sampler.subsets(move.size([x.shape for x in point])))
                    point = _dropped(point, move.axes, keep)
                    pairs = zip(results, move.results, strict=True)
                    results = [r if b is None else r[(slice(None),) * b + (keep,)] for r, b in pairs]
            smaller = run.attempt(point)
            if smaller is None or not equal(results, smaller):
                return False
        return True

    def _attempt(self, question: str, answer: Callable[[], _T]) -> _T | None:
        """Answer by running the op, or, whatever goes wrong there, not at all."""
        try:
            with aside():
                return answer()
        except Exception as error:  # the op's author did not expect such inputs: then nothing is known of it
            self.claims.failures[question] = f"{type(error).__name__}: {error}"
            log.info("cannot probe what is %s of %s: %s", question, self.claims.op, error)
            return None


def _unknown_integers(op: Op, facts: Sequence[Fact]) -> bool:
    """Whether an input holds integers that are not known: of what range is anybody's guess."""
    dtypes = [n.meta["tensor"].dtype for n in op.inputs]
    return any(not d.is_floating_point and d != torch.bool and not f.total for d, f in zip(dtypes, facts, strict=True))


def _unmasked(op: Op, facts: Sequence[Fact]) -> list[Fact]:
    """Facts of the integers, and nothing known of the floating inputs."""
    return [Fact.unknown(len(s)) if is_float(n) else f for n, f, s in zip(op.inputs, facts, op.shapes, strict=True)]


def _partners(op: Op, i: int, axis: int) -> Iterator[dict[int, int]]:
    """The axis of input ``i``, alone and with axes of other inputs that are as long, fewest first."""
    size = op.shapes[i][axis]
    same = {j: axis for j, n in enumerate(op.inputs) if n is op.inputs[i]}
    others = [j for j, n in enumerate(op.inputs) if n is not op.inputs[i]]
    options = [[None, *(a for a, n in enumerate(op.shapes[j]) if n == size)] for j in others]
    combinations = sorted(
        itertools.islice(itertools.product(*options), 4 * _MOST_PARTNERS), key=lambda c: len(c) - c.count(None)
    )
    for chosen in combinations[:_MOST_PARTNERS]:
        yield same | {j: a for j, a in zip(others, chosen, strict=True) if a is not None}


def _dropped(point: Point, axes: dict[int, int], keep: Tensor) -> Point:
    """The point with only some indices of these axes kept."""
    index = keep.nonzero()[:, 0]
    return [x.index_select(axes[i], index) if i in axes else x for i, x in enumerate(point)]


def _follower(full: Tensor, smaller: Tensor, keep: Tensor) -> int | None:
    """Along which axis the smaller result lacks some indices of the full one; ``None`` if it is the same, else -1."""
    if smaller.shape == full.shape:
        return None if bool(close(full, smaller).all()) else -1
    axes = [d for d, (a, b) in enumerate(zip(full.shape, smaller.shape, strict=False)) if a != b]
    if full.ndim != smaller.ndim or len(axes) != 1 or full.shape[axes[0]] != len(keep):
        return -1
    return axes[0] if equal([full[(slice(None),) * axes[0] + (keep,)]], [smaller]) else -1
