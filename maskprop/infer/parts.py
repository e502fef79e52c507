"""Calls that take a part of an axis: which part may be told by the sizes of the inputs, and be another for others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from maskprop.infer.facts import Fact, all_over
from maskprop.infer.op import Op
from maskprop.infer.rules.extent import own_axes
from maskprop.infer.sweep import Inference

aten = torch.ops.aten

LOOKS_UP = {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default}
_BOUNDED = {aten.slice.Tensor, aten.select.int}
_TAKES = LOOKS_UP | _BOUNDED


def look_up(inference: Inference) -> None:
    """Take from tables what is taken at known places: at another size that may fail, as the model then does."""
    for node in inference.graph.fx.nodes:
        if node.target in LOOKS_UP and takes_some(node, inference):
            inference.facts.known[node].value()


def takes_some(node: fx.Node, inference: Inference) -> bool:
    """Whether a call takes a part of a table, as the first so many positions."""
    return node.target in _TAKES and all(inference.facts.known[n].total for n in node.all_input_nodes)


def zero_all_along(node: fx.Node, inference: Inference) -> Tensor:
    """The zeros of what a call takes from a table, of those that are there wherever it is taken from."""
    op = inference.op(node)
    table, *others = (inference.facts.known[n] for n in op.inputs)
    if node.target is aten.index.Tensor:
        axes = [i for i, index in enumerate(op.arg("indices")) if index is not None]
    else:
        axes = [op.arg("dim", 0) % max(1, table.known.ndim)]
    taken = inference.rule(node).known(op, [Fact.zeros(all_over(table.zero, axes)), *others])
    assert isinstance(taken, Fact)
    return taken.zero


def other_parts(a: Inference, b: Inference) -> Iterator[tuple[fx.Node, Tensor]]:
    """The zeros of what calls take from a table, where they take something else in another pass: it may be none."""
    mates = _mates(a, b)
    for node in (node for node in a.graph.fx.nodes if takes_some(node, a)):
        other = mates.get(node)
        if other is None or not takes_some(other, b) or not _say_the_same(node, other):
            yield node, a.facts.known[node].zero & ~zero_all_along(node, a)


def leaving_a_rest(inference: Inference) -> list[fx.Node]:
    """Calls that take a part of an axis that is as long as the model says, the rest of which nobody takes."""
    return [node for node in inference.graph.fx.nodes if _leaves_a_rest(node, inference)]


def _leaves_a_rest(node: fx.Node, inference: Inference) -> bool:
    if node.target not in _BOUNDED or takes_some(node, inference):  # no layer makes the rest of a table
        return False
    op = inference.op(node)
    source, axis = op.inputs[0], op.arg("dim", 0) % len(op.shapes[0])
    size: int = op.shapes[0][axis]
    # the first and the last are what they are at every size
    plain = all(op.arg(name) in (None, 0, 1, -1) for name in ("start", "index")) and _end(op, size) in (1, -1, size)
    if plain or source not in inference.facts.needed or not own_axes(source)[axis]:
        return False
    taken: set[int] = set()
    for user in source.users:
        if user.target not in _BOUNDED or inference.op(user).arg("dim", 0) % len(op.shapes[0]) != axis:
            return False
        taken.update(_places(inference.op(user), size))
    return len(taken) < size


def _end(op: Op, size: int) -> int:
    end: int | None = op.arg("end")
    return size if end is None else min(end, size)


def _places(op: Op, size: int) -> Iterable[int]:
    """Which places of an axis a call takes."""
    if op.target is aten.select.int:
        return (op.arg("index") % size,)
    return range(size)[op.arg("start") : op.arg("end") : op.arg("step", 1)]


def sized_parts(parts: Collection[fx.Node], a: Inference, b: Inference) -> list[fx.Node]:
    """Those of the calls that take another part in another pass."""
    mates = _mates(a, b)
    return [node for node in parts if node not in mates or not _say_the_same(node, mates[node])]


def _mates(a: Inference, b: Inference) -> dict[fx.Node, fx.Node]:
    """The calls that take parts, and those of another pass that stand in their places among a module's calls."""

    def by_place(inference: Inference) -> dict[Any, list[fx.Node]]:
        found: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in inference.graph.ops:
            if node.target in _TAKES:
                found[node.meta["path"], node.target].append(node)
        return found

    theirs = by_place(b)
    return {one: two for place, mine in by_place(a).items() for one, two in zip(mine, theirs[place], strict=False)}


def _say_the_same(*calls: fx.Node) -> bool:
    """Whether two calls are told the same besides tensors."""
    one, other = ([v for v in call.args if not isinstance(v, fx.Node)] for call in calls)
    return one == other
