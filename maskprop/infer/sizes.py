"""Constants that are made of the sizes of an input, and so are others for another input.

``x * x.shape[1]`` shows in a trace as ``x * 6``. Where what masks leave may have met such a number, the model is
traced once more at other sizes, and what is known there too, and is the same, is a constant indeed.
"""

from __future__ import annotations

import functools
import itertools
import logging
import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from maskprop.graph.graph import is_op, shape_of
from maskprop.infer.facts import Fact, all_over, broadcast_shape, differs_along, everywhere, lead, squash
from maskprop.infer.parts import LOOKS_UP, other_parts, sized_parts, takes_some, zero_all_along
from maskprop.infer.places import VIEWS
from maskprop.infer.rules.joining import Cat
from maskprop.infer.rules.movement import Movement, Parts
from maskprop.infer.rules.pointwise import Uniform
from maskprop.infer.rules.registry import find_rule
from maskprop.infer.sweep import Inference
from maskprop.modules import of_torch

log = logging.getLogger(__name__)

aten = torch.ops.aten

# Calls that no size changes.
_TURNS = {
    *(*VIEWS, aten.t.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.detach.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
}
# Numbers that no one makes of a size: what keeps a division finite, say, or how far an image is stretched.
_LITERALS = {"eps", "momentum", "p", "scale_factors", "scales", "scales_h", "scales_w", "scales_d"}


def lasting(
    inference: Inference,
    used: Mapping[fx.Node, Tensor],
    parts: Collection[fx.Node],
    others: Iterable[Inference],
) -> bool:
    """Forget those facts that hold at one size only, if any element that is used may be made of such.

    And that a rest is not needed, of which an input of another size needs something.

    Args:
        inference: after its sweeps, which run again if anything is forgotten.
        used: which elements of values the plan takes for constants.
        parts: calls that leave a rest which nothing needs, see :func:`~maskprop.infer.parts.leaving_a_rest`.
        others: the same model's after the forward sweep, on inputs of other sizes; asked for only where something is
            in doubt.

    Returns:
        Whether all facts stay.
    """
    nodes = inference.graph.fx.nodes
    if not parts and not any(_in_doubt(node, inference) or _has_another_border(node, inference) for node in nodes):
        return True
    sources = made_of(inference, {**_zeros_made(inference), **used})
    doubts = {node for node in sources if _in_doubt(node, inference, sources)}
    unlike: dict[fx.Node, Tensor] = {node: sources[node] for node in sources if _has_another_border(node, inference)}
    sized: set[fx.Node] = set()
    if doubts or parts:
        log.info("tracing at other sizes, for %s", ", ".join(node.name for node in [*doubts, *parts]))
    for other in others if doubts or parts else ():
        sized.update(sized_parts(parts, inference, other))
        if not doubts:
            continue
        for node, differs in itertools.chain(_compare(inference, other, doubts), other_parts(inference, other)):
            unlike[node] = unlike[node] | differs if node in unlike else differs
    if unlike or sized:
        inference.forget(unlike, sized)
    return not unlike and not sized


def made_of(inference: Inference, used: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Any]:
    """Which known elements, not zero, some known elements are made of, themselves among them."""
    known, found = inference.facts.known, dict[fx.Node, Any](used)
    for node in reversed(inference.graph.fx.nodes):
        if node not in found or node.op != "call_function":
            continue
        if node.target is operator.getitem:
            several, index = node.args
            assert isinstance(several, fx.Node)
            parts = found.setdefault(several, [torch.zeros_like(fact.known) for fact in known[several]])
            parts[index] = parts[index] | found[node]
            continue
        op = inference.op(node)
        parts = found[node] if op.several else [found[node]]
        facts = [known[n] for n in op.inputs]
        for source, fact, part in zip(op.inputs, facts, inference.rule(node).needed(op, facts, parts), strict=True):
            part = part & fact.known & ~fact.zero
            if bool(part.any()):
                found[source] = found[source] | part if source in found else part
    return found


def _zeros_made(inference: Inference) -> dict[fx.Node, Tensor]:
    """Where numbers make a zero of what is none, as behind a relu: a zero by chance, not by the masks."""
    known, found = inference.facts.known, {}
    tables: set[fx.Node] = set()  # values that ``forward`` makes of numbers alone
    for node in inference.graph.fx.nodes:
        made_of_numbers = node.op == "call_function" and tables.issuperset(node.all_input_nodes)
        if "lifted" in node.meta or made_of_numbers or (is_op(node) and isinstance(inference.rule(node), Uniform)):
            tables.add(node)
        elif is_op(node) and (torch.Tag.pointwise in node.target.tags or takes_some(node, inference)):
            fact = known[node]
            if isinstance(fact, Fact) and not fact.plain and bool(fact.zero.any()):
                pointwise = torch.Tag.pointwise in node.target.tags
                before = _zero_before(node, inference, tables) if pointwise else zero_all_along(node, inference)
                if bool((fact.zero & ~before).any()):
                    found[node] = fact.zero & ~before
    return found


def _makes_a_table(node: fx.Node, inference: Inference) -> bool:
    """Whether a call makes a table of others, and may be told how: which part of it, or how often to repeat it."""
    if torch.Tag.pointwise in node.target.tags or node.target in _TURNS:  # type: ignore[union-attr]
        return False
    return all(inference.facts.known[n].total for n in node.all_input_nodes)


def _has_another_border(node: fx.Node, inference: Inference) -> bool:
    """Whether a window that moves on by several places sees constants with another border at another size."""
    fact = inference.facts.known.get(node)
    if not is_op(node) or not isinstance(fact, Fact) or not fact.total:
        return False
    stride, padding = (inference.op(node).arg(name) for name in ("stride", "padding"))
    if not stride or not padding or max(stride) == 1 or max(padding) == 0:
        return False
    return any(differs_along(fact.value(), axis) for axis in range(fact.known.ndim - len(stride), fact.known.ndim))


def _zero_before(node: fx.Node, inference: Inference, tables: Collection[fx.Node] = ()) -> Tensor:
    """Where some input of a pointwise op, but for tables, is a known zero, broadcast against each other."""
    ndim, inputs = len(shape_of(node)), (n for n in inference.op(node).inputs if n not in tables)
    zeros = [lead(inference.facts.known[n].zero, ndim) for n in inputs]
    return functools.reduce(operator.or_, zeros, everywhere(False, ndim))


def _in_doubt(node: fx.Node, inference: Inference, sources: Mapping[fx.Node, Any] | None = None) -> bool:
    """Whether a value may hold a number that was made of a size: by an op's arguments, or since the op is repeated.

    ``sources``: what counts; only its elements are repeated on.
    """
    if not is_op(node):
        return "lifted" in node.meta
    inputs, kind = node.all_input_nodes, node.meta.get("module")
    if not inputs:
        fact = inference.facts.known[node]
        return not isinstance(fact, Fact) or not bool(fact.zero.all())
    authored = kind is None or not of_torch(kind) or node.meta["path"] in inference.graph.hooked
    if (authored or node.target in LOOKS_UP) and _makes_a_table(node, inference):
        return True
    number = authored and bool(_numbers(node))
    repeated = (n for n in inputs if len(n.users) > 1 and (sources is None or n in sources) and _repeats(node, n))
    doubtful = number or any(repeated) or _chained(node, sources)
    return doubtful and not isinstance(inference.rule(node), (Movement, Parts, Cat))


def _repeats(node: fx.Node, source: fx.Node) -> bool:
    """Whether another call of the same op reads the same value in the same module, as in a loop over time."""
    return any(
        user is not node and user.target is node.target and user.meta.get("path") == node.meta["path"]
        for user in source.users
    )


def _chained(node: fx.Node, sources: Mapping[fx.Node, Any] | None) -> bool:
    """Whether a value went through the same op twice before in one call of a module, as in a loop of doubled steps.

    Once says nothing: a block adds what attention makes, and then what the layers behind it make.
    """
    count, call, stack, seen = 0, node.meta["call"], list(node.all_input_nodes), set[fx.Node]()
    while stack:
        before = stack.pop()
        if before.op != "call_function" or before.meta["call"] != call or before in seen:
            continue
        seen.add(before)
        if sources is None or before in sources:
            count += before.target is node.target
            if count == 2:
                return True
            if isinstance(before.target, OpOverload) and not _sums(before.target):
                stack += before.all_input_nodes
    return False


def _sums(target: OpOverload) -> bool:
    """Whether an op mixes units, and so reads a parameter most often, which tells whether it is repeated."""
    return torch.Tag.pointwise not in target.tags and not isinstance(find_rule(target), (Movement, Parts))


def _numbers(node: fx.Node) -> list[float | complex]:
    """The numbers among an op's arguments that its result is computed from."""
    if not isinstance(node.target, OpOverload):
        return []
    given = (node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in _values(node.target))
    return [number for number in given if isinstance(number, (int, float, complex)) and not isinstance(number, bool)]


@functools.cache
def _values(target: OpOverload) -> list[tuple[int, str]]:
    """Arguments that numbers are computed with: those of type ``int`` are axes, sizes and positions."""
    return [
        (i, a.name)
        for i, a in enumerate(target._schema.arguments)
        if a.name == "divisor_override"
        or (a.name not in _LITERALS and any(kind in str(a.type) for kind in ("number", "float", "Tensor")))
    ]


def _compare(a: Inference, b: Inference, doubts: set[fx.Node]) -> Iterator[tuple[fx.Node, Tensor]]:
    """What is known of values in one pass, and is not or is something else in the other.

    Nor is known what a number was used for that is another there: it may show at a third size only, as in a clamp.
    What cannot be compared, because ``forward`` goes other ways there, is not a constant if it is in doubt.
    """
    pairs = _pairs(a, b)
    sized: set[fx.Node] = set()
    for node in a.graph.fx.nodes:
        if node.op != "call_function":
            continue
        others = pairs.get(node, [])
        for other in others:
            inputs = list(zip(a.op(node).inputs, b.op(other).inputs, strict=False))
            sized.update(one for one, two in inputs if _lifted_apart(one, two))
            for one, two in itertools.chain(inputs, zip(_results(node), _results(other), strict=False)):
                if one.op == two.op == "call_function":
                    differs = _differs(one, a.facts.known[one], two, b.facts.known[two])
                    if bool(differs.any()):
                        yield one, differs
        paired = is_op(node) and not isinstance(a.rule(node), (Movement, Parts))  # what is moved shows where it is read
        apart = any(_numbers(node) != _numbers(other) for other in others) if others else paired and node in doubts
        if not apart and sized.isdisjoint(node.all_input_nodes):
            continue
        fact = a.facts.known[node]
        if isinstance(fact, Fact) and fact.plain:
            sized.add(node)
        elif is_op(node) and (apart or not isinstance(a.rule(node), Cat)):  # a part of it is compared by itself
            yield from _nonzero(node, a)


def _lifted_apart(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors that ``forward`` made of numbers are not equal."""
    if not ("lifted" in a.meta and "lifted" in b.meta):
        return False
    one, two = a.meta["state"], b.meta["state"]
    return one.shape != two.shape or (not one.is_meta and not torch.equal(one, two))


def _nonzero(node: fx.Node, inference: Inference) -> Iterator[tuple[fx.Node, Tensor]]:
    """What is known of an op's results but for the zeros that its inputs make."""
    for result in _results(node):
        fact = inference.facts.known[result]
        zero = fact.zero
        if torch.Tag.pointwise in node.target.tags and bool(zero.any()):  # type: ignore[union-attr]
            zero = zero & _zero_before(node, inference)
        if not fact.plain and bool((fact.known & ~zero).any()):
            yield result, fact.known & ~zero


def _pairs(a: Inference, b: Inference) -> dict[fx.Node, list[fx.Node]]:
    """Calls that do the same in two passes: in each module's, as far from the first on, or from the last back."""
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    theirs = _by_module(b)
    for path, mine in _by_module(a).items():
        yours = theirs.get(path, [])
        for one, two in itertools.islice(zip(mine, yours, strict=False), _alike(mine, yours)):
            found[one].append(two)
        if len(mine) != len(yours):
            back = mine[::-1], yours[::-1]
            for one, two in itertools.islice(zip(*back, strict=False), _alike(*back)):
                found[one].append(two)
    return found


def _alike(a: list[fx.Node], b: list[fx.Node]) -> int:
    """How many first calls are of the same ops."""
    return len(list(itertools.takewhile(lambda both: both[0].target is both[1].target, zip(a, b, strict=False))))


def _by_module(inference: Inference) -> dict[str, list[fx.Node]]:
    """Calls but for those that only move values: which of them there are depends on sizes."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in inference.graph.fx.nodes:
        if is_op(node) and not isinstance(inference.rule(node), (Movement, Parts)):
            found[node.meta["path"]].append(node)
    return found


def _results(node: fx.Node) -> list[fx.Node]:
    """The nodes that hold an op's results."""
    if not isinstance(node.meta["tensor"], tuple):
        return [node]
    parts = [user for user in node.users if user.target is operator.getitem]
    return sorted(parts, key=lambda part: part.args[1])  # type: ignore[arg-type, return-value]


def _differs(one: fx.Node, a: Fact, two: fx.Node, b: Fact) -> Tensor:
    """Where the first value has a fact that the second one has not; axes that a view merged are held apart."""
    axes, theirs = _merged(one), _merged(two)
    if len(axes) < 2 or len(axes) != len(theirs):
        return _unlike(a, b)
    found = _unlike(a.map(lambda t: _apart(t, axes)), b.map(lambda t: _apart(t, theirs)))
    if max(found.shape[: len(axes)]) > 1:
        found = found.expand(*axes, *found.shape[len(axes) :])
    return found.flatten(0, len(axes) - 1)


def _merged(node: fx.Node) -> tuple[int, ...]:
    """The sizes of the axes that a view made the first one of a value, as it does for a linear layer's product."""
    shape = shape_of(node)
    for one in (node, *node.all_input_nodes):
        if one.target in VIEWS:
            before, merged = shape_of(one.all_input_nodes[0]), shape_of(one)
            count = len(before) - len(merged) + 1
            if count > 1 and before[count:] == merged[1:] and merged[:1] == shape[:1]:
                return before[:count]
    return shape[:1]


def _apart(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    return t.reshape((axes if t.shape[0] != 1 else (1,) * len(axes)) + t.shape[1:])


def _unlike(a: Fact, b: Fact) -> Tensor:
    """Where the first fact knows something that the second does not.

    Along an axis that is longer in one of them, a value is as far from either end: padded borders look alike.
    """
    if a.plain or a.nothing:
        return a.known & False
    if a.known.ndim != b.known.ndim or not b.value().numel():
        return a.known & ~a.zero
    a = a.map(squash)  # what is the same all along an axis has to be so
    shape = broadcast_shape(a.known.shape, a.value().shape)
    longer = [d for d, (n, m) in enumerate(zip(shape, broadcast_shape(b.known.shape, b.value().shape), strict=True))
              if n != m and n > 1 and m > 1]  # fmt: skip
    alike = torch.zeros(shape, dtype=torch.bool)
    for ends in itertools.product((False, True), repeat=len(longer)):
        known, zero, value = b.known, b.zero, b.value()
        for d, end in zip(longer, ends, strict=True):
            known, zero, value = (_anchored(t, d, shape[d], end) for t in (known, zero, value))
        same = (a.zero & zero) | (known & _close(a.value(), value))
        alike = alike | all_over(same, [d for d, n in enumerate(shape) if n == 1]).expand(shape)
    return a.known & ~alike


def _anchored(t: Tensor, axis: int, length: int, end: bool) -> Tensor:
    """As much of a tensor along an axis, from one end on."""
    if t.shape[axis] == 1:
        return t
    places = torch.arange(length) + (t.shape[axis] - length if end else 0)
    return t.index_select(axis, places.clamp(0, t.shape[axis] - 1))


def _close(a: Tensor, b: Tensor) -> Tensor:
    if not (a.is_floating_point() or a.is_complex()):
        return a == b
    largest = a.abs().nan_to_num(posinf=0.0).max() if a.numel() else 0.0
    return torch.isclose(a, b.to(a.dtype), rtol=1e-9, atol=1e-12 * float(largest), equal_nan=True)
