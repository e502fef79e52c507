"""The registry: one rule an ATen op, open to users.

A rule is pure and sees one op. It answers three questions, and the defaults here are the answers that are
always safe:

* ``known``: which elements of the result are the same for every model input (forward);
* ``needed``: which elements of each input the needed elements of the result depend on (backward);
* ``couple``: how the units of the inputs' axes become units of the result's axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from maskprop.errors import RuleError
from maskprop.graph.graph import shape_of
from maskprop.infer.coupling import Coupling, Labels
from maskprop.infer.facts import Fact, any_over, as_double
from maskprop.infer.op import Op

# Above this many elements a wholly known value that masks touch is not evaluated only to find its zeros.
EAGER_LIMIT = 1 << 24


class Rule:
    """The rule of an op about which nothing is understood: everything is needed, and nothing may leave."""

    def known(self, op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
        """Facts of the result(s). Default: known if every input is wholly known."""
        if all(f.total for f in facts) and torch.Tag.nondeterministic_seeded not in op.target.tags:
            return evaluate(op, facts)
        found = unknowns(op)
        return found if op.several else found[0]

    def needed(self, op: Op, facts: Sequence[Fact], needed: Sequence[Tensor]) -> list[Tensor]:
        """For each input, which elements the result needs. Default: all, if any of the results is needed."""
        some = any(bool(n.any()) for n in needed)
        return [torch.full((1,) * len(shape), some) for shape in op.shapes]

    def couple(self, op: Op, labels: Sequence[Labels], c: Coupling) -> Labels | tuple[Labels, ...]:
        """Labels of the result(s). Default: pin every input, label nothing."""
        for array in labels:
            c.pin_all(array, f"{op.target} has no coupling rule")
        found: tuple[Labels, ...] = tuple([None] * (len(m.shape) if m is not None else 0) for m in op.results)
        return found if op.several else found[0]


_RULES: dict[OpOverload, Rule] = {}
_R = TypeVar("_R", bound=type[Rule])


def register(*targets: OpOverload) -> Callable[[_R], _R]:
    """Class decorator: the rule for these overloads.

    Raises:
        RuleError: an overload has a rule already.
    """

    def add(rule: _R) -> _R:
        for target in targets:
            register_rule(target, rule())
        return rule

    return add


def register_rule(target: OpOverload, rule: Rule) -> None:
    """Add the rule of one overload, for example ``torch.ops.mylib.op.default``.

    Raises:
        RuleError: it has one already, or ``target`` is no overload or ``rule`` no :class:`Rule`.
    """
    if not isinstance(target, OpOverload) or not isinstance(rule, Rule):
        raise RuleError(
            "a rule joins an OpOverload (such as torch.ops.aten.relu.default) and a Rule instance; got "
            f"{target!r} and {rule!r}."
        )
    if target in _RULES:
        raise RuleError(
            f"{target} already has the rule {type(_RULES[target]).__name__}. Remove it first with `unregister_rule`."
        )
    _RULES[target] = rule


def unregister_rule(target: OpOverload) -> Rule:
    """Remove and return the rule of an overload.

    Raises:
        RuleError: it has none.
    """
    if target not in _RULES:
        raise RuleError(f"{target} has no rule to remove.")
    return _RULES.pop(target)


def registered() -> frozenset[OpOverload]:
    """The overloads that have a rule of their own."""
    return frozenset(_RULES)


def find_rule(target: OpOverload) -> Rule | None:
    """The rule of an overload, by itself or by its pointwise tag; ``None`` if there is none."""
    rule = _RULES.get(target)
    if rule is None and torch.Tag.pointwise in target.tags and len(target._schema.returns) == 1:
        from maskprop.infer.rules.pointwise import POINTWISE

        return POINTWISE
    return rule


def unknowns(op: Op) -> tuple[Fact, ...]:
    """A fact for each result: nothing is known."""
    return tuple(Fact.unknown(0 if m is None else len(m.shape)) for m in op.results)


def evaluate(op: Op, facts: Sequence[Fact]) -> Fact | tuple[Fact, ...]:
    """The op on wholly known inputs: run on them, now if masks touch them and it is cheap, else on demand."""
    ndims = [len(m.shape) if m is not None else 0 for m in op.results]
    cache: list[tuple[Tensor, ...]] = []

    def results() -> tuple[Tensor, ...]:
        if not cache:
            pairs = zip(facts, op.inputs, strict=True)
            values = [f.value().expand(shape_of(n)).contiguous() for f, n in pairs]
            out = op.run(*values)
            cache.append(tuple(out) if op.several else (out,))
        return cache[0]

    size = max([n for m in op.results if m is not None for n in [_numel(m.shape)]], default=0)
    if all(f.plain for f in facts) or size > EAGER_LIMIT:
        found = tuple(Fact.constant(n, lambda i=i: as_double(results()[i])) for i, n in enumerate(ndims))  # type: ignore[misc]
    else:
        found = tuple(Fact.of_value(as_double(r)) if isinstance(r, Tensor) else Fact.unknown(0) for r in results())
    return found if op.several else found[0]


def some_needed(needed: Tensor) -> Tensor:
    """Whether anything is needed, as a tensor of one element with all axes."""
    return any_over(needed, range(needed.ndim))


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
